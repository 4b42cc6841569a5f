"""The kernels' tests in the emulator: `python -m tests.emulator` a subset, `--full` all; then a table of what came out.

Results are kept as they come, in build/emulator/. A run that was interrupted goes on where it was, as long as the
kernels have not changed. With --proof, docs/proof.md is written from the results.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import campaign, proof
from .plugin import logged


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.emulator", description=__doc__)
    parser.add_argument("--full", action="store_true", help="every test, on every target that is not excluded below")
    parser.add_argument("--arch", type=int, choices=(80, 90), help="one architecture only")
    parser.add_argument("--triton", choices=("3.6.0", "newest"), help="one version of Triton only")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32", "tf32"), help="only tests of this dtype")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="only tests that match, as pytest's -k")
    parser.add_argument("-j", type=int, default=1, metavar="N", help="processes")
    parser.add_argument("--results", type=Path, metavar="FILE", help="where the results are kept")
    parser.add_argument("--proof", action="store_true", help="write docs/proof.md, from the results so far")
    options = parser.parse_args()
    log = options.results or campaign.ROOT / "build" / "emulator" / f"{'full' if options.full else 'subset'}.jsonl"
    if options.full:
        architectures = [options.arch] if options.arch else [90, 80]
        tritons = [options.triton] if options.triton else ["newest", "3.6.0"]
        targets = campaign.targets(architectures, tritons, options.dtype)
    else:
        log.unlink(missing_ok=True)
        targets = [campaign.Target(options.arch or 90, options.triton or "newest", False)]
    if not options.proof:
        for target in targets:
            campaign.run(target, log, jobs=options.j, dtype=options.dtype, keyword=options.k, subset=not options.full)
    labels = {target.label for target in targets}
    rows = [row for row in logged(log) if options.proof or row["label"] in labels]
    if options.proof:
        rows = proof.latest(rows, campaign.collected())
        proof.write(rows, campaign.ROOT / "docs" / "proof.md")
    print(proof.table(rows))
    failed = [row for row in rows if row.get("outcome") == "failed"]
    for row in failed:
        print(f"FAILED {row['label']} {row['test']}: {row['message']}")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
