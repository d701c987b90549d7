"""The page of the spectra: the file's numbers, safe text, no network, plain words where a number or a matrix is missing."""

import json
import math
import re
from statistics import median

import pytest
from markupsafe import escape

from calibtrain.errors import UserError
from calibtrain.pipeline import spectra_figures as figures
from calibtrain.pipeline import spectra_numbers as numbers
from calibtrain.pipeline.spectra_page import read_spectra, render_page, write_page
from tests.unit.pipeline import spectra_cases as cases
from tests.unit.pipeline.test_report import Page, report

CASES = ("small", "large", "experts", "with_nulls", "hostile", "empty")


@pytest.fixture(scope="module")
def pages():
    made = {name: getattr(cases, name)() for name in CASES}
    return {name: (spectra, render_page(spectra)) for name, spectra in made.items()}


def cells(html, title):
    """Of the map with this title: every cell's hint with its colour class, dots, and dashes of absent matrices."""
    figure = html[html.index(f"<h3>{title}</h3>") :].split("</figure>")[0].split('class="scale"')[0]
    return (
        re.findall(r'<rect class="(\w+)".*?<title>(.*?)</title>', figure),
        figure.count("<circle"),
        figure.count("<line"),
    )


@pytest.mark.parametrize("name", CASES)
def test_page_is_well_formed_small_and_loads_nothing(pages, name):
    html = pages[name][1]
    page = Page(html)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert all(a.get("aria-label") for tag, a in page.tags if tag == "svg" and "aria-hidden" not in a)
    labels = {attributes.get("for") for tag, attributes in page.tags if tag == "label"}
    assert {attributes["id"] for tag, attributes in page.tags if tag == "select"} <= labels
    assert not [a for _, a in page.tags for key in a if key in ("src", "srcset", "action", "data", "xlink:href")]
    assert not [a for _, a in page.tags for key in a if key.startswith("on")]
    assert all(a.get("href", "#").startswith("#") for _, a in page.tags)
    assert not re.search(r"https?://|@import|url\((?!#)", html)
    assert len(html.encode()) < 1.5e6
    assert not {"nan", "None", "inf"} & set(re.findall(r"\w+", page.text))


def test_hostile_names_stay_text(pages):
    page = Page(pages["hostile"][1])
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == 2
    assert "img" not in names
    assert page.text.count(cases.HOSTILE) > 10  # shown as it is, template braces included
    assert any(cases.HOSTILE in fact for fact in page.data()["matrices"][0]["facts"])


def test_cells_tell_the_numbers_of_the_file_in_the_colour_of_their_size(pages):
    spectra, html = pages["small"]
    found, dots, absent = cells(html, "How far it moved")
    rows = {f"layer {row['layer']} {row['module']}": row for row in spectra["matrices"]}
    drifts = {hint.split(":")[0]: (float(hint.split(": ")[1].rstrip("%")) / 100, name) for name, hint in found}
    assert drifts.keys() == rows.keys()
    assert all(value == pytest.approx(rows[place]["relative_drift"], rel=5e-3) for place, (value, _) in drifts.items())
    ranked = [name for _, name in sorted(drifts.values())]
    assert ranked == sorted(ranked)  # q0 to q7
    assert len(set(ranked)) > 4
    assert (dots, absent) == (0, 0)
    for title, test in (("Level of the scaling", "scale"), ("Angle of the rotation", "shared_rotation")):
        found, dots, _ = cells(html, title)
        beyond = {place for place, row in rows.items() if row["tests"][test]["beyond"]}
        assert {hint.split(":")[0] for _, hint in found if hint.endswith("beyond chance")} == beyond
        assert dots == len(beyond) > 0
        assert f"beyond chance: {dots}</li>" in html
    for name, hint in cells(html, "Do both sides turn together?")[0]:
        one = rows[hint.split(":")[0]]["consistency"]
        assert f"NF {one['nf']:.3g} against {one['null']:.3g} by chance" in hint
        assert name[0] == ("p" if one["nf"] < one["null"] else "n")


def test_cell_of_experts_is_their_median_and_a_layer_without_them_is_shown_so(pages):
    spectra, html = pages["experts"]
    found, _, absent = cells(html, "How far it moved")
    assert len(found) == 24 * 7 - 3
    assert absent == 3
    (hint,) = [hint for _, hint in found if hint.startswith("layer 5 experts.up_proj, 32 matrices")]
    drifts = [
        row["relative_drift"] for row in spectra["matrices"] if (row["layer"], row["module"]) == (5, "experts.up_proj")
    ]
    assert (
        f"median {figures.percent(median(drifts))} ({figures.percent(min(drifts))} to {figures.percent(max(drifts))})"
        in hint
    )
    assert "a cell is the median of up to 32 matrices" in html


def test_what_has_no_value_is_no_number(pages):
    html = pages["with_nulls"][1]
    found, _, absent = cells(html, "Angle of the rotation")
    assert [hint for name, hint in found if name == "unknown"] == [
        "layer 2 router: no value",
        "layer 4 router: no value",
    ]
    assert absent == 7 * 4 - 15
    assert "lm_head: " in "".join(hint for _, hint in found)  # outside the layers
    first = Page(html).data()["matrices"][4]
    assert len(first["change"]) == len(first["before"]) == len(first["at"]) == 63
    assert "nothing changed" in html


def test_figures_of_a_matrix_are_those_of_the_file(pages):
    spectra, html = pages["large"]
    page = Page(html)
    data = page.data()
    options = [a for tag, a in page.tags if tag == "option"]
    listed = numbers.shown(spectra["matrices"])
    assert len(options) == len(listed) == len(data["matrices"]) == numbers.SHOWN
    least = min(row["relative_drift"] for row in listed)
    assert sum(row["relative_drift"] > least for row in spectra["matrices"]) == numbers.SHOWN - 1
    assert "260 more are left out here; spectra.json has them all." in page.text
    (chosen,) = [i for i, one in enumerate(options) if "selected" in one]
    assert listed[chosen]["relative_drift"] == max(row["relative_drift"] for row in spectra["matrices"])
    row, one = listed[chosen], data["matrices"][chosen]
    before, after = row["spectrum"]["before"], row["spectrum"]["after"]
    assert one["before"] == pytest.approx(before, rel=1e-3)
    assert one["change"] == pytest.approx([a / b - 1 for a, b in zip(after, before, strict=True)], rel=5e-3)
    assert one["at"] == pytest.approx([i / (row["rank"] - 1) for i in row["spectrum"]["index"]], abs=1e-4)
    # What is drawn without a script lies where the script would put it.
    drawn = re.search(r'id="before"[^>]* d="M([^"]*)"', html)[1].split("L")
    axes, (low, high) = data["axes"], one["range"]
    for point, share, value in zip(drawn, one["at"], before, strict=True):
        height = (math.log10(value) - low) / (high - low)
        x = axes["x0"] + share * (axes["x1"] - axes["x0"])
        y = axes["y0"] + height * (axes["y1"] - axes["y0"])
        assert [float(each) for each in point.split(",")] == pytest.approx([x, y], abs=0.1)


def test_tests_and_shares_are_those_of_the_file(pages):
    spectra, html = pages["small"]
    text = re.sub(r"\s+", " ", Page(html).text)
    for one in spectra["summary"]["tests"].values():
        assert f"{one['beyond']} of {one['tested']}" in text
    assert all(finding["text"] in text for finding in spectra["findings"])
    rows = [row["shares"]["scale"] for row in spectra["matrices"] if row["module"] == "o_proj"]
    (line,) = re.findall(r'o_proj<span class="soft">30 of 30 changed</span>.*?</tr>', html)
    assert f">{100 * sum(rows) / 30:.1f}%<" in line
    widths = [float(width) for width in re.findall(r'<rect class="part-\w+" x="[\d.]+%" y="0" width="([\d.]+)%"', line)]
    assert sum(widths) == pytest.approx(100, abs=0.05)
    assert "calibtrain spectra HuggingFaceTB/SmolLM2-135M out/model --null-seeds 5" in text


def test_what_chance_explains_stands_apart_from_what_it_does_not(pages):
    spectra, html = pages["small"]
    texts = {one["claim"]: one["text"] for one in spectra["findings"]}
    verdict, chance = (html[html.index(f'<div class="{name}') :].split("</div>")[0] for name in ("verdict", "chance"))
    assert [claim for claim, text in texts.items() if str(escape(text)) in verdict] == ["scale", "shared_rotation"]
    assert [claim for claim, text in texts.items() if str(escape(text)) in chance] == ["uniform_scaling"]
    assert html.index("What that means for forgetting") < html.index(str(escape(texts["forgetting"])))
    for row in spectra["matrices"]:
        for test in row["tests"].values():
            test["beyond"] = False
    assert "Nothing here is beyond chance" in render_page(cases.whole(spectra["matrices"]))
    for row in spectra["matrices"]:
        for test in row["tests"].values():
            test |= {"p": math.nan, "nulls": {}}
    assert "Nothing was held against chance" in render_page(cases.whole(spectra["matrices"]))
    assert "No matrix was compared" in pages["empty"][1]


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "spectra.json"
    spectra = cases.with_nulls()
    path.write_text(json.dumps(spectra))
    assert write_page(tmp_path, read_spectra(path)) == tmp_path / "spectra.html"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["spectra.html", "spectra.json"]
    del spectra["matrices"][2]["kind"]
    for text, says in (
        (json.dumps(spectra)[:-9], "cannot be read"),
        (json.dumps(spectra), r"matrices\[2\].kind is missing"),
        (json.dumps({**spectra, "format": 2}), "not of format 1"),
        (json.dumps({**spectra, "matrices": {"a": 1}}), "matrices is not a list"),
        ("[]", "not of format 1"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=f"spectra.json: .*{says}"):
            read_spectra(path)


def test_report_shows_the_findings_one_map_and_the_way_to_the_page():
    from calibtrain.pipeline.report import render_report

    small = cases.small()
    page = Page(render_report(report(spectra=small)))
    assert [a["href"] for tag, a in page.tags if tag == "a"] == ["#main", "spectra.html"]
    assert all(finding["text"] in page.text for finding in small["findings"])
    assert [a.get("class") for tag, a in page.tags if tag == "svg"].count("cells") == 1
    page = Page(render_report(report(spectra_problem="out/spectra.json: cannot be read")))
    assert "Not shown: out/spectra.json: cannot be read." in page.text
    assert "What training did to the weights" not in Page(render_report(report())).text
