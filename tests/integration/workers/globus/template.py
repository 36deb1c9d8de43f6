"""An endpoint's configuration as its manager makes it, by the real renderer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from .records import Json

RENDERS_S = 60.0


def render_config(template: str, options: Json, home: Path) -> str:
    """Fill a `user_config_template.yaml.j2` with the options of a submission.

    Args:
        template: The text of the template.
        options: What a caller gives as `user_endpoint_config`.
        home: A folder for the renderer's files.

    Returns:
        YAML for `start_user_endpoint`.

    Raises:
        RuntimeError: The renderer refuses; its words are in the text.
    """
    files = {"template.yaml.j2": template, "options.json": json.dumps(options)}
    for name, text in files.items():
        (home / name).write_text(text)
    program = Path(sys.executable).parent / "globus-compute-endpoint"
    done = subprocess.run(
        [program, "render-user-config", "-t", "template.yaml.j2", "-o", "options.json"],
        cwd=home,
        env=os.environ | {"GLOBUS_COMPUTE_USER_DIR": str(home)},
        capture_output=True,
        text=True,
        timeout=RENDERS_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the template does not render: {done.stderr or done.stdout}")
    return done.stdout
