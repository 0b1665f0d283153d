"""Move what a profile trained to another machine: one tar file of artifacts, scores and generated images."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from pathlib import Path

from mia_utils import paths
from mia_utils.runner import artifacts
from mia_utils.runner.plan import make_plan


def _folders(profile: str) -> dict[str, Path]:
    home = paths.get_artifact_dirs()[0]
    return {"artifacts": home, f"scores/{profile}": paths.get_scores_dir(profile), "raw": paths.get_raw_dir()}


def pack(profile: str, file: Path) -> int:
    """Write ``file`` with every trained model of a profile, its scores and generated images; returns its bytes."""
    plan = make_plan(profile, [])
    if plan.missing:
        ids = ", ".join(row.id for row in plan.missing[:3])
        n = len(plan.missing)
        raise ValueError(f"pack {profile}: {n} models are not trained ({ids} ...): first ./run_all.sh {profile}")
    _, scores, raw = _folders(profile)
    sources = {f"artifacts/{path.name}": path for path in plan.done.values()}
    for path in sources.values():
        artifacts.verify(path)
    sources |= {f"{scores}/{path.name}": path for path in sorted(_folders(profile)[scores].glob("*.*"))}
    sources |= {f"raw/{path.name}": path for path in sorted(_folders(profile)[raw].glob("scenes*.npz"))}

    def write(handle) -> None:
        with tarfile.open(fileobj=handle, mode="w") as tar:
            for name, path in sources.items():
                tar.add(path, name, filter=_anonymous)

    return paths.write_atomic(file, write).stat().st_size


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def unpack(file: Path) -> tuple[int, int]:
    """Put what ``pack`` wrote where it is looked for; what is there stays. Returns how many came and were there."""
    came = there = 0
    home = paths.get_home() / "data"
    home.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(file) as tar:
            names = {tuple(entry.name.split("/")) for entry in tar.getmembers()}
            profiles = {name[1] for name in names if name[0] == "scores" and len(name) > 2}
            targets = {key: path for profile in profiles or {""} for key, path in _folders(profile).items()}
            with tempfile.TemporaryDirectory(dir=home) as temporary:
                tar.extractall(temporary, filter="data")  # refuses links and paths that lead out of the folder
                for key, target in targets.items():
                    target.mkdir(parents=True, exist_ok=True)
                    for path in sorted((Path(temporary) / key).glob("*")):
                        if (target / path.name).exists():
                            there += 1
                            continue
                        if key == "artifacts":
                            artifacts.verify(path)
                        shutil.move(path, target / path.name)
                        came += 1
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{file}: expected a file written by ./run_all.sh pack, got {error}") from None
    return came, there
