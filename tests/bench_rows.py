"""Synthetic benchmark rows, for tests of what is made from them."""

from bench.measuring.rows import OK, OURS, RIVAL, WRONG, Environment, Results, Row


def environment(**changes) -> Environment:
    values = dict(device="Test GPU", slug="test-gpu", driver="1.2", versions={"torch": "2.9"}, commit="abc1234567",
                  date="2026-01-02T03:04:05+00:00", threads=2, copy_gbs=3000.0, matmul_tflops={"bf16": 800.0})
    return Environment(**(values | changes))


def row(variant: str, ms: float, role: str = RIVAL, **changes) -> Row:
    """A timed row whose 20th and 80th percentiles lie 1 % off its median."""
    values = dict(subject="brats", step="inference, logits", shape="16×2×240×240", batch=16, precision="bf16",
                  variant=variant, role=role, state=OK, p20_ms=0.99 * ms, p50_ms=ms, p80_ms=1.01 * ms, rounds=9,
                  images_per_second=16e3 / ms, tflops=384 / ms, gbs=1000 / ms, floor_ms=0.5, peak_bytes=10**8,
                  share_of_ceiling=0.5 / ms)  # fmt: skip
    return Row(**(values | changes))


def results(**changes) -> Results:
    """A network (inference in four variants, one wrong; training), a loss, an operator, a first result, a waterfall."""
    loss = dict(subject="dice_cross_entropy", step="forward + backward", shape="16×4×240×240", tflops=0.0)
    operator = dict(subject="conv_relu", step="forward", shape="16×(32+32)×240×240 → 32", tflops=0.0)
    rows = (
        row("plain", 4.0),
        row("plain, channels_last", 2.0),
        row("compiled", 0.1, state=WRONG, note="error 7 times its budget; not timed"),
        row("fastunet", 1.6, OURS),
        row("fastunet, graph", 1.25, OURS, peak_bytes=5 * 10**7),
        row("plain", 6.0, step="training", saved_bytes=10**8),
        row("fastunet", 4.0, OURS, step="training", saved_bytes=10**7),
        row("plain", 3.0, **loss, saved_bytes=10**8),
        row("fastunet", 1.0, OURS, **loss, saved_bytes=10**7, peak_bytes=2 * 10**7),
        row("plain", 3.0, **operator),
        row("fastunet", 4.0, OURS, **operator),
        row("fastunet", 2500.0, OURS, step="first result", shape="1×128×128"),
        row("compiled", 31000.0, step="first result", shape="1×128×128"),
        *(row(name, ms, role, subject="waterfall", step="inference, labels") for name, ms, role in (
            ("plain", 4.0, RIVAL), ("channels_last", 2.0, RIVAL), ("compiled", 1.8, RIVAL),
            ("+ fused epilogues", 1.7, OURS), ("+ graph", 1.25, OURS))),
    )  # fmt: skip
    return Results(environment(**changes), rows)
