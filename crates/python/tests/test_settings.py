"""Settings of the hook: a method that has no budget, and one that is given."""

import iceformer.transformers as hook
import pytest


def test_a_budget_for_a_method_that_has_none():
    for method in ("exact", "dci"):
        message = f'budget is 0.1 and method \'{method}\', which has none; expected method "budgeted" or "auto"'
        with pytest.raises(ValueError, match=message), hook.settings(method=method, budget=0.1):
            pass
        with pytest.raises(ValueError, match=message):
            hook.configure(method=method, budget=0.1)
        with hook.settings(method=method), pytest.raises(ValueError, match=message), hook.settings(budget=0.1):
            pass


def test_a_method_that_has_none_leaves_the_budget_behind():
    with hook.settings(method="budgeted", budget=0.02):
        with hook.settings(method="exact") as chosen:
            assert chosen.method == "exact" and chosen.budget is None
        with hook.settings(method="auto") as chosen:
            assert chosen.budget == 0.02


def test_both_in_the_environment(monkeypatch):
    monkeypatch.setenv("ICEFORMER_METHOD", "dci")
    monkeypatch.setenv("ICEFORMER_BUDGET", "0.02")
    with pytest.raises(ValueError, match="budget is 0.02 and method 'dci', which has none"):
        hook.Settings.from_environment()
