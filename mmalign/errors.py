"""Errors that a user can fix: each says what was expected, what was found and what to do."""


class UserError(ValueError):
    """Bad input or a bad setting. Entry points print the message without a traceback."""


class SampleError(UserError):
    """A training sample that cannot be used."""

    def __init__(self, sample_id: str, problem: str, remedy: str):
        super().__init__(f"sample {sample_id!r}: {problem}. {remedy}")
        self.sample_id, self.problem, self.remedy = sample_id, problem, remedy

    def __reduce__(self):  # crosses the boundary of a worker process
        return type(self), (self.sample_id, self.problem, self.remedy)
