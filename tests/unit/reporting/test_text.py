"""Text from elsewhere does no harm where it is shown: no markup, no HTML, no control of the terminal."""

import logging
import re
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from rich.text import Text

from pose.app.console import ConsoleFormatter, FileFormatter
from pose.errors import one_line, printable
from pose.evaluation.task import Estimate
from pose.positions import PoSE
from pose.reporting.card import Card, license_of, without_folders
from pose.reporting.tables import comparison_tables, print_table, results_table
from pose.reporting.text import markdown
from pose.rope import RopeGeometry, Yarn

# What is shown, by what was given.
TEXTS = {
    "<script>alert(1)</script>": "<script>alert(1)</script>",
    "two\nlines\r\nof it": "two lines of it",
    "\x1b[2J\x1b]0;title\x07": "[2J]0;title",
    "a | b": "a | b",
    "`code` ``": "`code` ``",
    "[link](x)": "[link](x)",
    "![image](x)": "![image](x)",
    "*bold* _slant_ ~~gone~~ $x$": "*bold* _slant_ ~~gone~~ $x$",
    "a_name_with_underscores": "a_name_with_underscores",
    "back\\slash \\": "back\\slash \\",
    "&lt;b&gt; &amp;": "&lt;b&gt; &amp;",
    "name\n---\nlicense: other\n# Title": "name --- license: other # Title",
    "\u202eright to left\u2028\x85\x9b1m": "right to left 1m",
    "bytes \udcff that are not UTF-8": "bytes that are not UTF-8",
    "<a href='javascript:x'>": "<a href='javascript:x'>",
    "[bold]rich[/bold] [/]": "[bold]rich[/bold] [/]",
    ":bomb: <!-- --> ```": ":bomb: <!-- --> ```",
    "naïve 漢字 👩‍💻": "naïve 漢字 👩‍💻",
}
CARD = Card(
    base="owner/name", license="mit", model_type="llama", window=2048, target_len=16_384, sampler=PoSE(2048, 16_384),
    scaling=Yarn().resolve(RopeGeometry(10_000.0, 8, 2048), 16_384), rope_base=10_000.0, data=["a"],
    training={"Seed": "0"}, results={"extended": {"ppl@2048": 9.0}}, measured_on=["b"], command="python train.py",
    versions={"torch": "2.13.0"}, commit="abc",
)  # fmt: skip


def rendered(text):
    """Tokens of a card's body, its rows as cells of plain text, and its paragraphs as plain text."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(ModelCard(text).text)
    kinds = {token.type for token in tokens} | {c.type for token in tokens for c in token.children or ()}
    texts = ["".join(c.content for c in t.children if c.type in ("text", "code_inline")) for t in tokens if t.children]
    return tokens, kinds, texts


@pytest.mark.parametrize("given", TEXTS)
def test_one_line_and_markdown(given):
    assert one_line(given) == " ".join(TEXTS[given].split())
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parseInline(markdown(given))[0].children
    assert {token.type for token in tokens} == {"text"}
    assert "".join(token.content for token in tokens) == one_line(given)
    assert "\x1b" not in printable(given) and printable("two\n\tlines") == "two\n\tlines"


@pytest.mark.parametrize("given", TEXTS)
def test_a_card_shows_every_field_as_it_was_given(given, tmp_path):
    """It has the links, tables and headings that it has of harmless fields, and no other markup."""
    shown = one_line(given)
    hostile = replace(
        CARD, base=given, license=given, model_type=given, data=[given], training={given: given}, measured_on=[given],
        results={"extended": {given: 9.0}}, command=f"python train.py {given}", versions={given: given}, commit=given,
    )  # fmt: skip
    for card in (hostile, replace(hostile, base=None), replace(hostile, target_len=2048)):
        card.write(tmp_path)
        text = (tmp_path / "README.md").read_text(encoding="utf-8")
        tokens, kinds, texts = rendered(text)
        _, usual, _ = rendered(replace(CARD, base=card.base and "a", target_len=card.target_len).text())
        assert kinds == usual and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
        links = [c.attrs["href"] for token in tokens for c in token.children or () if c.type == "link_open"]
        assert links == ["https://arxiv.org/abs/2309.10400"] * (card.target_len > 2048)
        assert len([token for token in tokens if token.type == "heading_open"]) == 5
        assert [t.content for t in tokens if t.type == "fence"][1] == f"python train.py {shown}\n"
        for wanted in (shown, f"With {shown} {shown}, commit {shown}."):
            assert wanted in texts
        assert any(text.endswith(f"these documents: {shown}.") for text in texts)
        rows = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
        cells = [len(re.findall(r"(?<!\\)\|", row)) for table in rows for row in table.splitlines()]
        assert set(cells) == {3}
    head = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", hostile.text(), re.DOTALL)[1])
    assert set(head) == {"base_model", "base_model_relation", "library_name", "license", "pipeline_tag", "tags"}
    assert head["license"] == shown and head["base_model"] == one_line(without_folders(given))
    assert license_of(str(tmp_path)) == shown


@pytest.mark.parametrize("given", TEXTS)
def test_tables_show_every_name_as_it_was_given(given, capsys):
    shown = Text(one_line(given)).plain.strip()
    found = {given: {"ppl@8": Estimate(1.0), f"ruler/{given}@8": Estimate(0.5), f"harness/{given}": Estimate(0.5)}}
    tables = [results_table({given: {"ppl@8": 1.0}}, given, ("ppl",)), *comparison_tables(found, given)]
    assert len(tables) == 3
    for table in tables:
        table.min_width = 110
        print_table(table)
    printed = capsys.readouterr().out
    assert printed.count(shown) >= 6 and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", printed)


def test_messages_have_no_control_characters_in_terminal_and_file():
    record = logging.LogRecord("pose", logging.WARNING, "x.py", 1, "in %s\nand", ("\x1b[2J\udcffa.txt\x9b",), None)
    assert ConsoleFormatter("%(message)s").format(record) == "Warning: in [2Ja.txt\nand"
    assert FileFormatter("[%(levelname)s] %(message)s").format(record) == "[WARNING] in [2Ja.txt\nand"
