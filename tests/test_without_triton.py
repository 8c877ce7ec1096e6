"""Where Triton is not installed: every op runs on a CPU, and none claims to run on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

_CODE = """
import sys
sys.modules["triton"] = None
import json, torch
from specdec.cli.info import ops
from specdec.kernels.library import OPS
from specdec.kernels.attention.tree_mask import ancestor_words

table = {name: (on_cpu, on_gpu) for name, on_cpu, on_gpu in ops()}
registered = [n for n in OPS if torch._C._dispatch_has_kernel_for_dispatch_key(f"specdec::{n}", "CUDA")]
words = ancestor_words(torch.tensor([[-1, 0, 0]]))
print(json.dumps([table, registered, words.flatten().tolist()]))
"""


def test_no_op_claims_to_run_on_a_gpu() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", _CODE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table, registered, words = json.loads(done.stdout)
    assert {"tree_attention", "kv_append_", "kv_commit_", "draw", "verify_tree"} <= set(table)
    assert {on_gpu for _, on_gpu in table.values()} == {"none"}
    assert registered == []
    assert {on_cpu for on_cpu, _ in table.values()} == {"PyTorch, fused by Inductor", "C++ kernel"}
    assert words == [1, 3, 5]  # ancestors, the node itself included, as bits
