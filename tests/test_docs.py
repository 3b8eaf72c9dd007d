"""The guides run as they stand, and their tables are those of the committed records."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import reroute_kernels as rk
from bench.grounding import report as grounding
from bench.pages.cpu import hooks_table
from bench.pages.markdown import replace_between
from bench.pages.models import runs_of
from bench.pages.performance import performance_page
from bench.pages.records import gpu_folders, read_all
from bench.pages.report import CONNECTOR, GROUNDING, TABLES, connector_record, pretrained_record
from bench.pretrained.connector_report import connector_card
from bench.pretrained.report import page as pretrained_page
from bench.speed.eager import gather_tokens, rank_tokens, scatter_tokens_, select_tokens

ROOT = Path(__file__).parents[1]
BACKEND = (ROOT / "docs" / "backend.md").read_text()


def eager_stage(hidden, full, kept, attention, norm, cos, sin, visual, keep, length, layers):
    """The router that the guide's function replaces: one sample, whole attention matrices, masks and `nonzero`."""
    if kept is not None:
        hidden = scatter_tokens_(full, kept[0], hidden)
    full = hidden
    states = norm(full)
    query, key = (
        projection(states).unflatten(-1, (-1, attention.head_dim))
        for projection in (attention.q_proj, attention.k_proj)
    )
    kept = select_tokens(rank_tokens(query, key, cos, sin), visual, ~visual, int(keep))
    assert kept.shape[1] == length
    hidden, cos, sin = gather_tokens(kept[0], full, cos, sin)
    for layer in layers:
        hidden = layer(hidden, cos, sin)
    return hidden, full, kept


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(16, 16)

    def forward(self, hidden, cos, sin):
        return hidden + self.mix(hidden.cumsum(dim=1)).tanh() * cos[..., :1] + sin[..., :1]


@pytest.mark.parametrize("backend", ["ref", "triton"])
@torch.no_grad()
def test_guide_replaces_an_eager_router(backend, launches, device):
    (code,) = re.findall(r"```python\n(.*?)```", BACKEND, flags=re.DOTALL)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 32
    names = {}
    exec(code, names)
    attention = SimpleNamespace(q_proj=nn.Linear(16, 16), k_proj=nn.Linear(16, 8), head_dim=4)
    norm, layers = nn.LayerNorm(16), [Layer() for _ in range(4)]
    for module in (attention.q_proj, attention.k_proj, norm, *layers):
        module.to(device)
    prompt = torch.randn(2, 40, 16, device=device)
    angles = torch.rand(1, 40, 2, device=device).repeat(1, 1, 2)
    places = torch.arange(40, device=device)
    # The second sample has more text, and its image elsewhere.
    visual = torch.stack([(places >= 8) & (places < 32), (places >= 3) & (places < 21)])
    keep = torch.tensor([6, 5], device=device)
    lengths = ((~visual).sum(1) + keep).tolist()

    def run(stage, samples, length):
        hidden, full, kept, chosen = prompt[samples].clone(), None, None, []
        for part in (layers[:2], layers[2:]):
            tables = (angles.cos(), angles.sin())
            hidden, full, kept = stage(
                hidden, full, kept, attention, norm, *tables, visual[samples], keep[samples], length, part
            )
            chosen.append(kept)
        return rk.ops.scatter_tokens_(full.clone(), kept, hidden), chosen

    with rk.backend(backend):
        routed, indices = run(names["routed_stage"], slice(0, 2), max(lengths))
        assert [name for name, _ in launches].count("select_and_compact") == (2 if backend == "triton" else 0)
        for sample, length in enumerate(lengths):
            eager, expected = run(eager_stage, slice(sample, sample + 1), length)
            for index, alone in zip(indices, expected, strict=True):
                assert torch.equal(index[sample, :length], alone[0])
                assert (index[sample, length:] == -1).all()
            torch.testing.assert_close(routed[sample], eager[0])
    assert not torch.equal(*indices), "both stages chose the same tokens"


def test_tables_are_those_of_the_records(tmp_path):
    pages = {page: tmp_path / Path(page).name for page, _, _ in TABLES}
    for page, copy in pages.items():
        copy.write_text((ROOT / page).read_text())
    for page, marker, text in TABLES:
        replace_between(pages[page], marker, text())
    for page, copy in pages.items():
        assert copy.read_text() == (ROOT / page).read_text(), page
    assert [record["triton"] for record in read_all("compile/*.json")] == ["3.6.0", "3.7.1", "3.8.0", "3.9.0"]
    versions = {record["versions"]["transformers"] for record in read_all("models/*.json")}
    assert versions == {"5.4.0", "5.17.0", "5.23.0", "5.24.0"}
    measured = {name: json.loads(path.read_text()) for name, path in GROUNDING.items()}
    assert "\n".join(grounding.page(measured)) + "\n" == (ROOT / "docs" / "grounding.md").read_text()
    connector = connector_record()
    pretrained = pretrained_page(pretrained_record(), connector)
    assert "\n".join(pretrained) + "\n" == (ROOT / "docs" / "pretrained.md").read_text()
    assert connector_card(*connector) == (CONNECTOR / "README.md").read_text()
    model = ROOT / "models" / "tiny_grounding"
    log = [json.loads(line) for line in (model / "training.jsonl").read_text().splitlines()]
    assert grounding.model_card(measured["results"], log) == (model / "README.md").read_text()
    performance_page(gpu_folders(), tmp_path)
    assert (tmp_path / "performance.md").read_text() == (ROOT / "docs" / "performance.md").read_text()


def test_versions_that_follow_on_each_other_are_a_run():
    versions = ["5.4.0", "5.17.0", "5.23.0", "5.24.0"]
    assert runs_of(versions, [False, True, True, True]) == "5.17.0 to 5.24.0"
    assert runs_of(versions, [True, False, False, True]) == "5.4.0, 5.24.0"
    assert runs_of(versions, [True, True, False, True]) == "5.4.0 to 5.17.0, 5.24.0"


def test_table_of_what_hooks_add():
    python = {
        "call": "decode step",
        "layers": 32,
        "microseconds": {"unrouted": 4000.0, "routed": 4210.0},
        "added_microseconds": {"routed": 200.0},
    }
    lines = hooks_table([{"group": "hooks", "extra_info": python}])
    assert lines[-1] == "| decode step | 4,000 | 4,210 | 200 |"
    assert not hooks_table([{"group": "prefill", "extra_info": {}}])


def test_no_kernel_spills_in_any_record():
    for record in read_all("compile/triton-*.json"):
        assert not [row for row in record["kernels"] if row["spills"] or row["stack"]]


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page):
    titles = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        target = page.parent / link if link else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), (link, anchor)


def test_every_page_is_in_the_index_and_the_navigation():
    index, navigation = (ROOT / "docs" / "index.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"]({page.name})" in index
        assert page.name in navigation


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", ["policies.md"])
def test_code_blocks_of_a_page_run(page, capsys, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(block, {})


@pytest.mark.parametrize("name", re.findall(r"reroute_kernels[\w.]*", (ROOT / "docs" / "api.md").read_text()))
def test_reference_names_what_exists(name):
    import pkgutil

    assert pkgutil.resolve_name(name) is not None
