"""Move what a profile trained to another machine: one tar file of artifacts, scores and generated images."""

import shutil
import tarfile
import tempfile
from pathlib import Path

from mia_utils import paths
from mia_utils.runner import artifacts
from mia_utils.runner.plan import make_plan


def pack(profile: str, file: Path) -> int:
    """Write ``file`` with every trained model of a profile, its scores and generated images; returns its bytes."""
    plan = make_plan(profile, [])
    if n := len(plan.missing):
        ids = ", ".join(row.id for row in plan.missing[:3])
        raise ValueError(f"pack {profile}: {n} models are not trained ({ids} ...): first ./run_all.sh {profile}")
    sources = {f"artifacts/{path.name}": path for path in plan.done.values()}
    for path in sources.values():
        artifacts.verify(path)
    sources |= {f"scores/{profile}/{path.name}": path for path in paths.get_scores_dir(profile).glob("*.*")}
    sources |= {f"raw/{path.name}": path for path in paths.get_raw_dir().glob("scenes*.npz")}

    def write(handle) -> None:
        with tarfile.open(fileobj=handle, mode="w") as tar:
            for name, path in sorted(sources.items()):
                tar.add(path, name, filter=lambda e: e.replace(uid=0, gid=0, uname="", gname="", deep=False))

    return paths.write_atomic(file, write).stat().st_size


def unpack(file: Path) -> tuple[int, int]:
    """Put what ``pack`` wrote where it is looked for; what is there stays. Returns how many came and were there."""
    came, there, scores = 0, 0, paths.get_scores_dir("any").parent
    places = {"artifacts/*": paths.get_artifact_dirs()[0], "scores/*/*": scores, "raw/*": paths.get_raw_dir()}
    scores.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(file) as tar, tempfile.TemporaryDirectory(dir=scores.parent) as temporary:
            tar.extractall(temporary, filter="data")  # refuses links and paths that lead out of the folder
            for pattern, folder in places.items():
                for path in sorted(Path(temporary).glob(pattern)):
                    target = folder.joinpath(*path.relative_to(temporary).parts[1:])
                    if target.exists():
                        there += 1
                        continue
                    if pattern == "artifacts/*":
                        artifacts.verify(path)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.move(path, target)
                    came += 1
    except (tarfile.TarError, EOFError, FileExistsError) as error:
        raise ValueError(f"{file}: expected a file written by ./run_all.sh pack, got {error}") from None
    return came, there
