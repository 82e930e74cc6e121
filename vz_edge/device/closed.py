"""What stands in the place of a part that was given back."""

from __future__ import annotations

from typing import Any, NoReturn

from vz_edge.errors import RequestError


class Closed:
    """Raises RequestError for whatever is asked of it: what it was a part of was closed."""

    def __init__(self, what: str, remedy: str) -> None:
        self.__dict__["_message"] = f"the {what} was closed; {remedy}"

    def __getattr__(self, name: str) -> NoReturn:
        raise RequestError(self._message)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise RequestError(self._message)


# Typed as Any: each stands for a part of another type.
CLOSED_MODEL: Any = Closed("model", "load it again")
CLOSED_SESSION: Any = Closed("session", "make another one of the model")
