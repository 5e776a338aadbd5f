"""The one exception that a user is meant to see."""


class UserError(ValueError):
    """What the user wrote or has cannot work; the message is one line that says what to do next."""
