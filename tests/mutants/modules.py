"""The mutated modules, the tests that must notice, and the mutations that change nothing visible."""

from dataclasses import dataclass

STORIES = ("tests/gateway/test_training.py", "tests/state/gc/test_collector.py", "tests/gateway/test_rest_runs.py")
SIMULATION = ("tests/sim/test_histories.py",)


@dataclass(frozen=True)
class Tests:
    """`first`: quick, and nearly always enough. `then`: for the survivors of those."""

    first: tuple[str, ...]
    then: tuple[str, ...] = ()


def journal(*own: str) -> Tests:
    return Tests((*own, "tests/state/journal"), (*STORIES, *SIMULATION))


MODULES: dict[str, Tests] = {
    "knapper/ids.py": Tests(("tests/test_ids.py",)),
    "knapper/state/api_keys.py": Tests(("tests/security/test_keys.py",)),
    "knapper/state/tokens.py": Tests(("tests/state/test_tokens.py",), ("tests/security/test_keys.py",)),
    "knapper/engine/training/losses.py": Tests(
        ("tests/engine/training/test_losses.py",), ("tests/engine/training/test_validation.py",)
    ),
    "knapper/engine/training/optimizer.py": Tests(("tests/engine/training/test_optimizer.py",)),
    "gateway/auth.py": Tests(
        ("tests/security/test_keys.py", "tests/gateway/test_auth.py", "tests/gateway/test_tenants.py")
    ),
    "gateway/tenants.py": Tests(
        ("tests/gateway/test_tenants.py", "tests/security/test_keys.py"), ("tests/state/test_tokens.py",)
    ),
    "knapper/state/captures.py": Tests(("tests/state/test_captures.py",), ("tests/gateway/openai/test_capture.py",)),
    "knapper/engine/layers/chunked.py": Tests(("tests/engine/layers/test_recurrences.py",)),
    "knapper/engine/layers/state_space.py": Tests(("tests/engine/layers/test_recurrences.py",)),
    "knapper/jobs/captured.py": Tests(("tests/jobs/test_captured.py",)),
    "knapper/state/journal/accept.py": journal(),
    "knapper/state/journal/bundles.py": journal(),
    "knapper/state/journal/ends.py": journal(),
    "knapper/state/journal/history.py": journal(),
    "knapper/state/journal/machine.py": journal(),
    "knapper/state/layout.py": journal("tests/state/test_layout.py"),
    "knapper/state/journal/newest.py": journal(),
    "knapper/state/journal/records.py": journal(),
    "knapper/state/journal/results.py": journal(),
    "knapper/state/journal/run.py": journal(),
    "knapper/state/journal/apply.py": journal(),
    "knapper/state/journal/operations.py": journal(),
    "knapper/state/journal/outbox.py": journal(),
    "knapper/state/journal/own_objects.py": journal(),
    "knapper/state/journal/replay.py": journal(),
    "knapper/state/journal/exports.py": journal(),
    "knapper/state/journal/envelope.py": journal(),
}

# Left out of every trial: they start programs, which read the module from its file, or take long and show the same.
NOT = (
    "not gcs and not listens_beyond and not beyond_this_machine and not no_fault_of_the_store and not rests_on_no_clock"
)

# By path, line's text and mutation: why no test can tell it from the original.
_DEVICE = "only a device that this is not run on could tell"
_PAIRED = "both have an entry a part"
_SIZE = "a bound on memory, or on a batch of reads, that no result depends on"
_TWIN = "the same constant names it where it is written and where it is read, within one process"
_STRIDE = "another way through the same numbers finds the same, with at most one halving, so one listing, more"
_UNREAD = "set together with `low`, before it is read"
_RESULTS = "knapper/state/journal/results.py"
_NEWEST = "knapper/state/journal/newest.py"
_BETWEEN = "return await _between(store, prefix, page[-1], layout.last_number(page[-1]) + step)"
_SEARCHED = "if seq <= seen.applied and seq not in seen.record_of and seen.low > 0:"
_AHEAD = "while ahead := await _page_after(store, prefix, layout.last_number(page[-1]) + step):"
_EPOCHS = "_COLLECTED, _UNREADABLE = 0, -1  # epochs in place of a record that is gone or damaged; claims count from 1"
_NONE_FAILED = "self._failed = (-1, 0)  # (operation, how often it failed by a defect)"
_STATE_SPACE = "knapper/engine/layers/state_space.py"
_DRAWN = "numbers to try products with: any others do, too"
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (_STATE_SPACE, "draw = torch.Generator().manual_seed(0)", "0 -> 1"): _DRAWN,
    (_STATE_SPACE, "draw = torch.Generator().manual_seed(0)", "0 -> -1"): _DRAWN,
    (
        _STATE_SPACE,
        "weight_KX = torch.randn(facts.taps, facts.conv_width, generator=draw).to(device)",
        "torch.randn(facts.taps, facts.conv_width, generator=draw) without generator",
    ): _DRAWN,
    (
        _STATE_SPACE,
        "decay_H = torch.rand(facts.heads, generator=draw).to(device)",
        "torch.rand(facts.heads, generator=draw) without generator",
    ): _DRAWN,
    (
        _STATE_SPACE,
        "bias_H, skip_H = torch.zeros(facts.heads, device=device), torch.ones(facts.heads, device=device)",
        "torch.zeros(facts.heads, device=device) without device",
    ): _DEVICE,
    (
        _STATE_SPACE,
        "bias_H, skip_H = torch.zeros(facts.heads, device=device), torch.ones(facts.heads, device=device)",
        "torch.ones(facts.heads, device=device) without device",
    ): _DEVICE,
    ("knapper/state/journal/apply.py", _NONE_FAILED, "1 -> 2"): "no operation has a number below 0",
    (
        "knapper/state/journal/run.py",
        'first = Manifest(epoch=0, holder="", address="", terms=self.holder.terms, claimed_at=0.0)',
        "0.0 -> -1.0",
    ): "a claim sets it",
    (
        "knapper/state/layout.py",
        'return "".join(map("".join, zip(self._literals, [*segments, ""], strict=False)))',
        "zip(self._literals, [*segments, ''], strict=False) without strict",
    ): "it is the default",
    (
        "knapper/state/layout.py",
        'EMPTY, PART, NAMED_BY_HASH = "", "part", "named by hash"  # objects that are no record',
        "'' -> 'x'",
    ): _TWIN,
    (
        "knapper/state/journal/run.py",
        "self._replay = self._replay.grown(outcome.cost_s, loaded=result.seq if loads else -1)",
        "1 -> 2",
    ): "the highest number of those that loaded, of which none is below 0",
    (
        "knapper/state/journal/machine.py",
        "step: int = -1  # optimizer steps in the weights of an export",
        "1 -> 2",
    ): "read with an export alone, which states it",
    (
        "knapper/state/journal/machine.py",
        "step: int = -1  # optimizer steps in the weights of an export",
        "-1 without its USub",
    ): "read with an export alone, which states it",
    (_NEWEST, _BETWEEN, "-1 without its USub"): _STRIDE,
    (_NEWEST, _BETWEEN, "1 -> 2"): _STRIDE,
    (_NEWEST, _BETWEEN, "1 -> 0"): _STRIDE,
    (_NEWEST, _AHEAD, "1 -> 2"): _STRIDE,
    (_NEWEST, "while high - layout.last_number(low) > PAGE:", "Gt -> GtE"): _STRIDE,
    (
        "knapper/state/layout.py",
        'seq, _, epoch = prefix.rstrip("/").rpartition("/")[2].partition("-")',
        "'/' -> '/x'",
    ): "a prefix ends in a digit and a slash",
    (
        _RESULTS,
        _EPOCHS,
        "-1 without its USub",
    ): "only compared with the epoch of a collected record",
    (_RESULTS, _EPOCHS, "1 -> 2"): "only compared with the epoch of a collected record",
    (_RESULTS, "low: int = -1  # -1: nothing was read yet", "1 -> 2"): "any below 0 says so",
    (_RESULTS, "high: int = 0", "0 -> 1"): _UNREAD,
    (_RESULTS, "high: int = 0", "0 -> -1"): _UNREAD,
    (_RESULTS, "announced: int = 0", "0 -> -1"): "records count from 1: both mean none",
    (_RESULTS, "_CACHE_BYTES_MAX = 256 * 1024 * 1024", "256 -> 257"): _SIZE,
    (_RESULTS, "_CACHE_BYTES_MAX = 256 * 1024 * 1024", "256 -> 255"): _SIZE,
    (_RESULTS, "_CACHE_BYTES_MAX = 256 * 1024 * 1024", "1024 -> 1025"): _SIZE,
    (_RESULTS, "_CACHE_BYTES_MAX = 256 * 1024 * 1024", "1024 -> 1023"): _SIZE,
    (_RESULTS, "if not await self._store.list(layout.commits(run), limit=1):", "1 -> 2"): "whether there is any",
    (_RESULTS, "above, step = below, 2 * step", "2 -> 3"): "another stride finds the same",
    (
        _RESULTS,
        "_BEHIND_MAX = 1000  # records; a reader further behind starts again at the newest",
        "1000 -> 1001",
    ): _SIZE,
    (
        _RESULTS,
        "_BEHIND_MAX = 1000  # records; a reader further behind starts again at the newest",
        "1000 -> 999",
    ): _SIZE,
    (_RESULTS, _SEARCHED, "LtE -> Lt"): "where the newest result is, is always known",
    (_RESULTS, _SEARCHED, "Gt -> GtE"): "a search of no records reads none",
    (_RESULTS, _SEARCHED, "0 -> -1"): "a search of no records reads none",
    (
        _RESULTS,
        "return commit.results[-1].seq < seq",
        "Lt -> LtE",
    ): "they differ for the record with the result itself, and reading that ends the search",
    (
        _RESULTS,
        "if seq <= seen.applied:  # applied, and collected since",
        "LtE -> Lt",
    ): "where the newest answer lies is always known",
    (
        "knapper/state/journal/bundles.py",
        "return index, {part.name: content for part, content in zip(parts, contents, strict=True)}",
        "True -> False",
    ): _PAIRED,
    ("gateway/tenants.py", '_ASKER = "knapper.asker"', "'knapper.asker' -> 'knapper.askerx'"): _TWIN,
    ("gateway/tenants.py", "tenant_of(request)", "without tenant_of(request)"): "its callers have checked before",
    (
        "gateway/tenants.py",
        'authorization = request.headers.get("authorization", "")',
        "'' -> 'x'",
    ): "neither is a Bearer",
    (
        "knapper/engine/training/optimizer.py",
        "_SMALL = 1e-9  # squares of parts of a smaller norm may vanish in float32",
        "1e-09 -> 2e-09",
    ): "both ways of the norm are right between the two",
    ("knapper/engine/training/optimizer.py", "if scale < 1:", "Lt -> LtE"): "a gradient times 1 is the gradient",
    (
        "knapper/engine/training/optimizer.py",
        "[torch.full((), float(moments.step), device=weights_P.device)],",
        "torch.full((), float(moments.step), device=weights_P.device) without device",
    ): _DEVICE,
    ("knapper/engine/training/optimizer.py", 'if values_P.device.type == "mps":', "'mps' -> 'mpsx'"): _DEVICE,
    ("knapper/engine/training/optimizer.py", "return scaled_norm(values_P)", "return None"): _DEVICE,
    (
        "knapper/engine/training/optimizer.py",
        "return norm if _SMALL < norm < math.inf else _norm_of_any(values_P)",
        "Lt -> LtE",
    ): "at the bounds themselves both ways give the same",
}

_ONE = "there is one"
_TRIED = "what the probe tries: any sizes and numbers do, too"
_CHUNKED: dict[str, dict[str, tuple[str, ...]]] = {
    "a chunk without rows changes nothing": {
        "members = [sequence for sequence in order if counts[sequence] > number]": ("Gt -> GtE",),
        "joined = F.pad(torch.cat(flat, dim=1), (0, 0, 0, 1)).index_select(0, layout.rows_C)": ("1 -> 2",),
    },
    "states that nobody asked for are made, and dropped": {
        "self, x_NX: Tensor, rows: PackedRows, solve: Solve | None, *, keeps: bool = False": ("False -> True",),
        "whole, _ = recurrence.packed(x_NX, PackedRows([tokens]), keeps=False)": ("False -> True",),
        "rest, _ = recurrence.packed(x_NX[count:], beside, keeps=False)": ("False -> True",),
        "crowd, _ = recurrence.packed(torch.cat([x_NX, x_NX[:count]]), several, keeps=False)": ("False -> True",),
    },
    _PAIRED: {
        "both = zip(last, kept, strict=True)": ("True -> False", "zip(last, kept, strict=True) without strict"),
        "return Rows(*(part.reshape(-1, CHUNK_ROWS, *of.shape[1:]) for part, of in zip(parts, rows, strict=True)))": (
            "True -> False",
            "zip(parts, rows, strict=True) without strict",
        ),
    },
    _TRIED: {
        "tokens, width = 2 * CHUNK_ROWS + 7, recurrence.convolution.weight_KX.shape[1] + numbers": (
            "2 -> 3", "7 -> 6", "7 -> 8", "Add -> Sub",
        ),
        "x_NX = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1)).to(device)": (
            "1 -> 0", "1 -> 2", "torch.randn(tokens, width, generator=torch.Generator().ma... without generator",
        ),
        "for count in (1, 9, CHUNK_ROWS, CHUNK_ROWS + 12):": (
            "1 -> 2", "12 -> 11", "12 -> 13", "9 -> 10", "9 -> 8", "Add -> Sub",
        ),
    },
    _DEVICE: {
        "row = recurrence.step(x_NX[count, None], state, torch.tensor([count], device=device))": (
            "torch.tensor([count], device=device) without device",
        ),
    },
    _ONE: {
        "(row[0], whole[count]),": ("0 -> -1",),
        "gradient.backward(y_NY, grads[0])": ("0 -> -1",),
        "s = delta_rule.folded(full)[0]": ("0 -> -1",),
        "of_rows = [torch.zeros_like(part[0]) for part in full[1:]]": ("0 -> -1",),
    },
    "it is the same exchange": {
        "k[:1] += before.k.transpose(1, 2)": ("before.k.transpose(1, 2) with its first two swapped",),
        "g[:1] += before.g.transpose(1, 2)": ("before.g.transpose(1, 2) with its first two swapped",),
    },
}  # fmt: skip
EQUIVALENT |= {
    ("knapper/engine/layers/chunked.py", line, said): reason
    for reason, lines in _CHUNKED.items()
    for line, saids in lines.items()
    for said in saids
}
