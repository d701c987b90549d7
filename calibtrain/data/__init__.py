"""Sources, templates, splits and collation."""
