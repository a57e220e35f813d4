"""Calls bound by the signatures of one release, in signatures.json as tools/te_signatures.py read them."""

import json
import os
from inspect import Parameter, Signature
from pathlib import Path

VERSION = os.environ["TE_STUB_VERSION"]
_READ = json.loads(Path(__file__).with_name("signatures.json").read_text("utf-8"))[VERSION]
SIGNATURES = {
    name: Signature(
        [
            Parameter(one, Parameter.POSITIONAL_OR_KEYWORD, default=None if optional else Parameter.empty)
            for one, optional in listed
        ]
    )
    for name, listed in _READ.items()
}


def bound(name, args, kwargs):
    """{parameter: what was passed for it}; TypeError, as Python's own, for a call that the release does not take."""
    return SIGNATURES[name].bind(*args, **kwargs).arguments
