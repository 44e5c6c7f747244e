"""The peers' own environments: .headrace/peers/NAME, made once by this module.

python -m benchmarks.overhead.peers     (make bench-overhead PEERS=1)
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".headrace" / "peers"
LITELLM, VLLM_ROUTER = "litellm", "vllm-router"
REQUIREMENTS = {LITELLM: ["litellm[proxy]==1.106.2"], VLLM_ROUTER: ["vllm-router"]}
INSTALL_TIMEOUT_S = 900


def program(peer: str) -> Path:
    """Return where a peer's command is, installed or not."""
    return FOLDER / peer / "bin" / peer


def installed(peer: str) -> bool:
    """Tell whether a peer can be started."""
    return program(peer).exists()


def main() -> int:
    """Install what is missing; a peer that cannot be had is said and left out."""
    uv = Path(sys.executable).with_name("uv")
    for peer, requirements in REQUIREMENTS.items():
        if installed(peer):
            print(f"{peer}: installed")
            continue
        python = FOLDER / peer / "bin" / "python"
        commands = [
            [str(uv), "venv", "--quiet", "--clear", "--python", sys.executable, str(FOLDER / peer)],
            [str(uv), "pip", "install", "--quiet", "--python", str(python), *requirements],
        ]
        try:
            for command in commands:
                subprocess.run(command, check=True, timeout=INSTALL_TIMEOUT_S)
            print(f"{peer}: installed" if installed(peer) else f"{peer}: has no command {peer}")
        except (OSError, subprocess.SubprocessError) as error:
            print(f"{peer}: could not be installed, it is left out: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
