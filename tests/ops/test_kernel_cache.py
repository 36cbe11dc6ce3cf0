"""Compiled kernels are kept between processes only while everything that was compiled into them is as it was."""

import ast
import hashlib
from pathlib import Path

import sd_vae.ops

FOLDER = Path(sd_vae.ops.__file__).parent


def test_kernels_change_with_what_is_compiled_into_them() -> None:
    inlined = b"".join((FOLDER / f"{name}.py").read_bytes() for name in ("products", "transforms", "vectors"))
    assigned = {
        target.id: node.value
        for node in ast.parse((FOLDER / "kernels.py").read_text()).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    digest = hashlib.sha256(inlined).hexdigest()[:16]

    stated = ast.literal_eval(assigned["INLINED"])
    assert stated == digest, f'put INLINED = "{digest}" into kernels.py, or numba runs what it compiled before'
