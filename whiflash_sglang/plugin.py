"""Entry point that SGLang calls in every process."""


def register() -> None:
    pass
