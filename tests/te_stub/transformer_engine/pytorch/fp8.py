"""Whether quantization is on, with which recipe, and what modules have asked to be reduced over which group."""

from contextlib import contextmanager

from transformer_engine.common.recipe import DelayedScaling
from transformer_engine.released import bound


class FP8GlobalStateManager:
    enabled = False
    recipe = None
    group = None
    modules = None

    @classmethod
    def is_fp8_enabled(cls):
        return cls.enabled

    @classmethod
    def get_fp8_recipe(cls):
        return cls.recipe

    @classmethod
    def with_fp8_parameters(cls):
        return False

    @classmethod
    def reset(cls):
        cls.enabled, cls.recipe, cls.group, cls.modules = False, None, None, []


FP8GlobalStateManager.reset()


def fp8_autocast(*args, **kwargs):
    return _autocast(**bound("fp8_autocast", args, kwargs))


@contextmanager
def _autocast(enabled=True, calibrating=False, fp8_recipe=None, fp8_group=None, _graph=False):
    manager = FP8GlobalStateManager
    before = manager.enabled, manager.recipe, manager.group
    manager.enabled, manager.recipe, manager.group = enabled, fp8_recipe or DelayedScaling(), fp8_group
    try:
        yield
    finally:
        manager.enabled, manager.recipe, manager.group = before


def fp8_model_init(enabled=True, recipe=None, preserve_high_precision_init_val=False):
    raise NotImplementedError("the stub has no parameters in FP8")
