"""Work for a worker that can be told to fail."""


class Echo:
    def __init__(self, argument: bytes) -> None:
        self.argument = argument

    def __call__(self, payload: bytes, shared: bytes) -> bytes:
        return self.argument + payload + shared
