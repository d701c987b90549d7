"""What a question, an answer, its span in a reply and "right" are: one file a kind; no other file knows a kind."""
