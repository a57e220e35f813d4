"""Refusals are values that survive the way from rank to rank."""

import pickle

from hp_plugin.refusal import Refusal, RefusedError


def test_a_refused_request_says_all_reasons_and_keeps_them_as_values() -> None:
    reasons = [Refusal("memory", "needs 3 bytes more", 3.0), Refusal("heads", "7 heads do not divide over 2")]
    error = RefusedError(iter(reasons), "tp=2: ", "; tp=1 can")
    assert str(error) == "tp=2: needs 3 bytes more; 7 heads do not divide over 2; tp=1 can"
    assert str(RefusedError(reasons[1:])) == "7 heads do not divide over 2"
    for again in (error, pickle.loads(pickle.dumps(error))):
        assert again.refusals == tuple(reasons) and str(again) == str(error)
        assert isinstance(again, ValueError)


def test_an_error_can_be_made_of_its_text() -> None:
    """As `megatron.core.transformer.spec_utils.build_module` does, to say what it was building."""
    error = RefusedError([Refusal("heads", "7 heads do not divide over 2")], "grid 2,1: ")
    again = type(error)(f"{error} when instantiating SelfAttention")
    assert str(again) == "grid 2,1: 7 heads do not divide over 2 when instantiating SelfAttention"
    assert [refusal.text for refusal in again.refusals] == [str(again)]
