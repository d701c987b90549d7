"""What may stand in a message."""

from calibtrain.errors import LINE_LENGTH, told


def test_a_message_holds_nothing_that_a_terminal_obeys_and_no_endless_line():
    found = told("path: \x1b[2J\x00\ud800 é\n" + "x" * 5000)
    first, second = found.split("\n")
    assert first == r"path: \x1b[2J\x00\ud800 é"
    assert second == "x" * LINE_LENGTH + f" ... ({5000 - LINE_LENGTH} more characters)"
