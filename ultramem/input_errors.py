"""What a command takes for bad input, and says in one line."""

INPUT_ERRORS = (ValueError, FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, ImportError)


def one_line(error: BaseException) -> str:
    """The error's text without line breaks."""
    return " ".join(str(error).split())
