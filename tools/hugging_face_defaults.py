"""Writes the planner's table of Hugging Face defaults from the installed transformers; takes no arguments."""

import json
from pathlib import Path

import transformers

from hp_plugin.planner.inputs.hugging_face.defaults import TABLE, read_classes
from hp_plugin.planner.inputs.hugging_face.model_types import MODEL_TYPES

path = Path(__file__).parents[1] / "hp_plugin" / "planner" / TABLE
types = read_classes(MODEL_TYPES)
lines = [f"  {json.dumps(kind)}: {json.dumps(fields)}" for kind, fields in types.items()]
source = f"transformers {transformers.__version__}, configuration classes (tools/hugging_face_defaults.py)"
path.write_text(f'{{\n "source": {json.dumps(source)},\n "types": {{\n' + ",\n".join(lines) + "\n }\n}\n")
print(f"{path}: {len(types)} model types")
