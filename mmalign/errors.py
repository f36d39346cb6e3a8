"""Errors that a user can fix: each says what was expected, what was found and what to do."""


class UserError(ValueError):
    """Bad input or a bad setting. Entry points print the message without a traceback.

    What the message quotes of a file cannot control the terminal: it is escaped.
    """

    def __init__(self, message: str):
        super().__init__("\n".join(_escape(line) for line in message.split("\n")))


def readable(text: str, most: int = 300) -> str:
    """Text of a file for a message: what cannot be printed escaped, a long middle left out."""
    half = most // 2 - 20
    head, tail = (text, "") if len(text) <= most else (text[:half], text[-half:])
    head, tail = _escape(head), _escape(tail)
    if not tail and len(head) <= most:
        return head
    return f"{head[:half]} ... ({len(text):,} characters) ... {(tail or head)[-half:]}"


def _escape(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class SampleError(UserError):
    """A training sample that cannot be used."""

    def __init__(self, sample_id: str, problem: str, remedy: str):
        problem = readable(problem)  # it quotes the sample, which may hold a whole picture
        super().__init__(f"sample {sample_id!r}: {problem}. {remedy}")
        self.sample_id, self.problem, self.remedy = sample_id, problem, remedy

    def __reduce__(self):  # crosses the boundary of a worker process
        return type(self), (self.sample_id, self.problem, self.remedy)


class LongSampleError(SampleError):
    """A training sample of too many tokens."""
