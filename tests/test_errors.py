"""errors: one tree, messages that name the way out, and errors that survive a trip between processes."""

from __future__ import annotations

import inspect
import math
import pickle

import pytest

from renorm import errors
from renorm.errors import FileExists, MissingExtra, RenormError, UnknownName, UsageError, require

TREE = [c for c in vars(errors).values() if inspect.isclass(c) and issubclass(c, Exception)]


@pytest.mark.parametrize("error", TREE, ids=lambda c: c.__name__)
def test_every_error_is_a_renorm_error_with_exit_code_2_and_stands_in_the_drawing(error: type[RenormError]) -> None:
    assert issubclass(error, RenormError)
    assert error.exit_code == 2
    assert error.__name__ in (errors.__doc__ or "")
    assert error.__name__ in errors.__all__


def test_the_builtin_parents_are_those_that_callers_may_already_catch() -> None:
    parents = {c.__name__: c.__mro__ for c in TREE}
    for name in ("UsageError", "UnknownName", "BatchError", "OneShot", "DataError"):
        assert ValueError in parents[name]
    assert ImportError in parents["MissingExtra"]
    assert FileExistsError in parents["FileExists"]


def test_an_unknown_name_offers_the_nearest_known_one_and_the_list() -> None:
    with pytest.raises(UsageError, match=r"no method 'Shrnk'; did you mean 'shrink'\? Known: shrink, tent\."):
        raise UnknownName("method", "Shrnk", ["shrink", "tent"])


def test_an_unknown_name_far_from_all_others_guesses_nothing() -> None:
    assert str(UnknownName("method", "zzz", ["shrink"])) == "there is no method 'zzz'. Known: shrink."
    assert str(UnknownName("factory", "f", [])) == "there is no factory 'f'. No factory is known here."


def test_a_long_list_is_shown_by_the_close_names_and_counted() -> None:
    known = [f"resnet{k}" for k in range(500)] + [f"vit{k}" for k in range(500)]
    message = str(UnknownName("model", "rsnet77", known))
    assert "did you mean 'resnet77'? Known: resnet77, resnet" in message
    assert message.endswith(", … (1000 in all).")
    assert "vit" not in message
    assert str(UnknownName("model", "?", known)).endswith("resnet19, … (1000 in all).")


def test_require_returns_the_module() -> None:
    assert require("math", extra="images", purpose="counting") is math


def test_require_names_the_extra_that_brings_the_missing_package() -> None:
    with pytest.raises(
        MissingExtra, match=r'timm: models needs nosuchpackage, .*pip install "renorm\[images\]"'
    ) as caught:
        require("nosuchpackage.models", extra="images", purpose="timm: models")
    assert caught.value.package == "nosuchpackage"


@pytest.mark.parametrize(
    "error",
    [UnknownName("a", "b", ["c"]), MissingExtra("images", "timm", "timm: models"), FileExists("x stands there")],
)
def test_errors_survive_pickling(error: RenormError) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)
