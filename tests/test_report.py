"""The pages about results: whole, escaped, and with nothing from elsewhere."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

import nibabel as nib
import numpy as np
import pytest
from conftest import ASYMMETRIC
from dicom_series import write_series
from PIL import Image
from test_segment import run

from scoat_fast.cli import EXIT_FAILED_CASES, EXIT_OK, EXIT_USAGE
from scoat_fast.imaging.window import LUNG
from scoat_fast.report.followup import cuts, read_visits
from scoat_fast.report.pages import number, rows_of

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """A page whose elements are all closed: its text, its addresses and its elements."""

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.text, self.addresses, self.elements = [], "", [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        assert not [name for name, _ in attributes if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


HOSTILE = "=1+1<script>alert(1)<\uff0fscript> '\"&=cmd"


@pytest.fixture
def results(ct, phantom, weights, tmp_path) -> Path:
    """Of a volume, of one with a hostile name, of a picture, and of a file that is none."""
    inputs = tmp_path / "in"
    inputs.mkdir()
    shutil.copy(ct, inputs / "plain.nii.gz")
    shutil.copy(ct, inputs / f"{HOSTILE}.nii.gz")
    Image.fromarray(((phantom[:, :, 2].T + 1250) / 1500 * 255).clip(0, 255).astype(np.uint8)).save(inputs / "p.png")
    (inputs / "bad.nii").write_text("hello")
    out = tmp_path / "results"
    options = ("--weights", weights, "--save-attention", "--quiet")
    assert run("segment", inputs, "-o", out, *options) == EXIT_FAILED_CASES
    return out


def test_pages_are_whole_and_need_nothing_else(results, tmp_path):
    report = tmp_path / "report"
    assert run("report", results, "-o", report, "--quiet") == EXIT_OK
    pages = {path: Page(path) for path in report.rglob("*.html")}
    assert len(pages) == 5
    for path, page in pages.items():
        assert "script" not in page.elements and "Research only" in page.text
        for address in page.addresses:
            assert address.startswith("data:image/webp;base64,") or (path.parent / unquote(address)).is_file(), address
        assert str(tmp_path) not in page.text
    index = pages[report / "index.html"]
    assert HOSTILE in index.text and "4 cases" in index.text and "1 failed" in index.text
    case = pages[report / "cases" / f"{HOSTILE}.html"]
    numbers = json.loads((results / f"{HOSTILE}.json").read_text())["statistics"]
    assert f"{numbers['ml']:.1f} mL" in case.text and "Ground glass" in case.text
    assert sum(address.startswith("data:") for address in case.addresses) == 7  # the slices, and six maps
    assert "a header of 348 bytes is wanted" in pages[report / "cases" / "bad.html"].text
    picture = pages[report / "cases" / "p.html"]
    assert sum(address.startswith("data:") for address in picture.addresses) == 7
    assert not [line for line in (results / "cases.csv").read_text().splitlines() if line.startswith(("=", '"='))]
    before = {path: path.read_bytes() for path in pages}
    assert run("report", results, "-o", report, "--quiet") == EXIT_OK  # again, over its own pages
    assert {path: path.read_bytes() for path in pages} == before
    assert run("report", results, "-o", report, "--quiet", "--paths") == EXIT_OK
    assert str(tmp_path / "in") in Page(report / "index.html").text


def test_what_is_damaged_costs_no_other_page(results, tmp_path, capsys):
    (results / "plain.json").write_text((results / "plain.json").read_text()[:-30])
    (results / "p_overlay.png").write_bytes(b"x")
    (results / f"{HOSTILE}_attention_x11.nii.gz").write_bytes(b"x")
    (results / "half.json").write_text('{"case": "half", "scoat_fast": "0.1.0", "unfinished": true}')
    report = tmp_path / "report"
    assert run("report", results, "-o", report, "--quiet") == EXIT_FAILED_CASES
    said = capsys.readouterr().err
    assert "plain.json: its report is missing or damaged" in said and "p_overlay.png" in said
    assert "attention_x11.nii.gz: truncated" in said
    assert "missing or damaged" in Page(report / "cases" / "plain.html").text
    assert "a run was stopped before all results were there" in Page(report / "cases" / "half.html").text
    assert "picture of this case is missing or damaged" in Page(report / "cases" / "p.html").text
    assert len(list(report.rglob("*.html"))) == 6


def test_a_case_in_several_tables_is_one_case(ct, weights, tmp_path):
    """Run whole, when it could not be read, and then in parts."""
    data = ct.read_bytes()
    ct.write_bytes(b"hello")
    results = tmp_path / "results"
    for parts in ((), ("--num-parts", 2, "--part", 1)):
        code = run("segment", ct, "-o", results, "--weights", weights, "--quiet", *parts)
        assert code == (EXIT_OK if parts else EXIT_FAILED_CASES)
        ct.write_bytes(data)
    os.utime(results / "cases.csv", (1000, 1000))
    assert run("report", results, "-o", tmp_path / "report", "--quiet") == EXIT_OK
    text = Page(tmp_path / "report" / "index.html").text
    assert "1 cases" in text and "failed" not in text


def test_a_scan_that_got_another_name_is_one_case(ct, weights, tmp_path):
    """As more of its name joined it."""
    arguments = ["segment", tmp_path / "in", "-o", tmp_path / "results", "--weights", weights, "--quiet"]
    for patient, name in (("a", "ct"), ("b", "caf\udce9")):
        (tmp_path / "in" / patient).mkdir(parents=True)
        shutil.copy(ct, tmp_path / "in" / patient / "ct.nii.gz")
        shutil.copy(ct, tmp_path / "in" / patient / f"{name}.nii.gz")  # no UTF-8
        assert run(*arguments) == EXIT_OK
    assert len(list((tmp_path / "results").glob("*.json"))) == 4
    assert run("report", tmp_path / "results", "-o", tmp_path / "report", "--quiet") == EXIT_OK
    index = Page(tmp_path / "report" / "index.html")
    assert "3 cases" in index.text
    (tmp_path / "results" / "cases.csv").unlink()  # a later one would name none of them
    assert run("report", tmp_path / "results", "-o", tmp_path / "other", "--quiet") == EXIT_OK
    assert "3 cases" in Page(tmp_path / "other" / "index.html").text
    for address in index.addresses:
        assert address.startswith("data:") or (tmp_path / "report" / os.fsdecode(unquote_to_bytes(address))).is_file()


def test_a_table_leads_out_of_no_folder(results, tmp_path, capsys):
    table = results / "cases.csv"
    table.write_text(table.read_text().replace("plain", "../../plain", 1))
    report = tmp_path / "deep" / "report"
    report.parent.mkdir()
    assert run("report", results, "-o", report, "--quiet") == EXIT_USAGE
    assert "no table of this program" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.html"))


def test_files_of_others_stay(results, tmp_path, capsys):
    report = tmp_path / "report"
    report.mkdir()
    (report / "index.html").write_text("<html>mine")
    assert run("report", results, "-o", report, "--quiet") == EXIT_USAGE
    assert "is no page of this program" in capsys.readouterr().err
    assert (report / "index.html").read_text() == "<html>mine"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run("report", empty, "-o", report, "--quiet") == EXIT_USAGE
    assert "no results of scoat-fast segment" in capsys.readouterr().err


def test_numbers_as_people_read_them():
    assert number("ml", 12.345) == "12.3 mL" and number("share_of_lung", 0.1234) == "12.3 %"
    assert number("slices", 0) == "0" and number("hu_mean", None) == "\u2013" and number("new_thing", 1.25) == "1.2"
    assert rows_of({"new_thing": 3, "ml": 1.0, "mm3": 1000.0}) == [("Opacity", "1.0 mL"), ("new_thing", "3")]


# Over time


@pytest.fixture
def visits(phantom, weights, tmp_path) -> Path:
    """Three results of one patient, with less and less in them."""
    inputs = tmp_path / "visits"
    inputs.mkdir()
    for k in range(3):
        nib.save(nib.Nifti1Image(phantom[:, :, : 6 - k], ASYMMETRIC), inputs / f"v{k}.nii.gz")
    options = ("--weights", weights, "--threshold", 0.2, "--quiet")
    assert run("segment", inputs, "-o", tmp_path / "results", *options) == EXIT_OK
    return tmp_path / "results"


def test_followup_by_date(visits, tmp_path):
    page = tmp_path / "page.html"
    dates = {"2026-03-01": "v2", "2025-12-31": "v0", "2026-02-11": "v1"}
    given = [f"{date}={visits / name}.json" for date, name in dates.items()]
    assert run("followup", *given, "-o", page) == EXIT_OK
    rows = list(csv.DictReader((tmp_path / "page.csv").open()))
    assert [row["date"] for row in rows] == ["2025-12-31", "2026-02-11", "2026-03-01"]
    ml = [json.loads((visits / f"v{k}.json").read_text())["statistics"]["ml"] for k in range(3)]
    assert [float(row["ml"]) for row in rows] == pytest.approx(ml)
    assert rows[0]["change_ml"] == "" and float(rows[1]["change_ml"]) == pytest.approx(ml[1] - ml[0])
    assert float(rows[2]["change_percent"]) == pytest.approx(100 * (ml[2] - ml[1]) / ml[1])
    shown = Page(page)
    assert "not registered" in shown.text and f"{ml[1] - ml[0]:+.1f} mL" in shown.text
    assert sum(address.startswith("data:") for address in shown.addresses) == 6
    assert "script" not in shown.elements


def test_followup_without_an_input_still_has_its_numbers(visits, phantom, tmp_path):
    (tmp_path / "visits" / "v0.nii.gz").unlink()
    nib.save(nib.Nifti1Image(phantom[:, :, 1:], ASYMMETRIC), tmp_path / "visits" / "v1.nii.gz")
    os.utime(tmp_path / "visits" / "v1.nii.gz", (1000, 1000))  # as rsync -t leaves it
    os.utime(tmp_path / "visits" / "v2.nii.gz")  # touched, not changed
    given = [f"2026-0{k + 1}-01={visits / f'v{k}'}.json" for k in range(3)]
    assert run("followup", *given, "-o", tmp_path / "page.html") == EXIT_OK
    page = Page(tmp_path / "page.html")
    assert "cannot be read: No such file" in page.text and "v1.nii.gz was changed since" in page.text
    assert sum(address.startswith("data:") for address in page.addresses) == 2


def test_followups_that_make_no_sense(visits, results, tmp_path, capsys):
    first = f"2026-01-01={visits / 'v0.json'}"
    for given, output, reason in (
        ([first], "page.html", "two or more different dates"),
        ([first, f"2026-01-01={visits / 'v1.json'}"], "page.html", "two or more different dates"),
        ([first, f"1.2.2026={visits / 'v1.json'}"], "page.html", "a date as 2026-01-31"),
        ([first, f"2026-02-01={visits / 'nothing.json'}"], "page.html", "a report that scoat-fast segment wrote"),
        ([first, f"2026-02-01={results / 'p.json'}"], "page.html", "has no mL"),
        ([first, f"2026-02-01={visits / 'v1.json'}"], "page.txt", "ends in .html"),
    ):
        assert run("followup", *given, "-o", tmp_path / output) == EXIT_USAGE
        assert reason in capsys.readouterr().err
    assert not list(tmp_path.glob("page*"))
    (tmp_path / "page.csv").write_text("my,own,notes\n")
    given = [first, f"2026-02-01={visits / 'v1.json'}"]
    assert run("followup", *given, "-o", tmp_path / "page.html") == EXIT_USAGE
    assert "page.csv: cannot be written: a file of this name is there already" in capsys.readouterr().err
    assert (tmp_path / "page.csv").read_text() == "my,own,notes\n" and not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(("option", "name"), [(("--threshold", 0.9), "threshold"), (("--min-mm3", 9), "min_mm3")])
def test_a_change_of_how_scans_were_segmented_is_none_of_the_patient(visits, weights, tmp_path, capsys, option, name):
    options = ("--weights", weights, "--threshold", 0.2, "--quiet")
    assert run("segment", tmp_path / "visits", "-o", tmp_path / "other", *options, *option) == EXIT_OK
    given = [f"2026-01-01={visits / 'v0.json'}", f"2026-02-01={tmp_path / 'other' / 'v0.json'}"]
    for command in (
        ("followup", *given, "-o", tmp_path / "page.html"),
        ("figure", 6, *given, "-o", tmp_path / "6.png"),
    ):
        assert run(*command) == EXIT_USAGE
        assert f"the same {name} as in {visits / 'v0.json'} is wanted (" in capsys.readouterr().err
    assert not list(tmp_path.glob("page*"))


def test_who_recovered_is_shown_in_the_middle(visits, phantom, weights, tmp_path):
    report = visits / "v0.json"
    nothing = json.loads(report.read_text())
    nothing["statistics"]["ml"] = 0.0
    report.write_text(json.dumps(nothing))
    mask = nib.load(visits / "v0_mask.nii.gz")
    nib.save(nib.Nifti1Image(0 * np.asarray(mask.dataobj), mask.affine), visits / "v0_mask.nii.gz")
    given = [f"2026-01-01={visits / 'v1.json'}", f"2026-02-01={report}"]
    recovered = read_visits(given)[1]
    (axial, marked, _), (coronal, *_) = cuts(recovered)
    greys = LUNG.apply(phantom.transpose(2, 1, 0)[:, :, :].astype(np.float32))  # feet up, front first, right first
    assert not marked.any()
    np.testing.assert_allclose(axial, greys[3], atol=1e-6)
    np.testing.assert_allclose(coronal, greys[::-1, 18], atol=1e-6)
    assert run("followup", *given, "-o", tmp_path / "page.html") == EXIT_OK
    text = Page(tmp_path / "page.html").text
    assert text.count("no opacity, slices in the middle") == 1 and "a threshold of 0.2" in text


@pytest.mark.parametrize("zipped", [False, True])
def test_series_of_one_folder_have_pictures(zipped, phantom, weights, tmp_path):
    (tmp_path / "ct").mkdir()
    for k in (1, 2):
        write_series(
            tmp_path / f"{k}",
            phantom.transpose(2, 1, 0).astype(float) + 10 * k,
            change=lambda _, slice, k=k: setattr(slice, "SeriesNumber", k),
        )
        for path in (tmp_path / f"{k}").iterdir():
            path.rename(tmp_path / "ct" / f"{k}{path.name}")
    given = tmp_path / "ct"
    if zipped:
        given = shutil.make_archive(str(tmp_path / "ct"), "zip", given)
    assert run("segment", given, "-o", tmp_path / "out", "--weights", weights, "--quiet") == EXIT_OK
    visits = read_visits([f"2026-0{k}-01={tmp_path / 'out' / f'ct_{k}.json'}" for k in (1, 2)])
    (first, *_), (second, *_) = (cuts(visit)[0] for visit in visits)
    assert (second - first).mean() > 0.005


# In a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_shows_the_pages(results, tmp_path):
    """Without a complaint, at the width of a desk and of a phone, with the slices and the contours in sight."""
    report = tmp_path / "report"
    assert run("report", results, "-o", report, "--quiet") == EXIT_OK
    wanted = {"index.html": 0.001, "cases/plain.html": 0.02, f"cases/{HOSTILE}.html": 0.02}  # share of dark pixels
    for page, dark in wanted.items():
        for width in (1200, 500):
            shot = tmp_path / "shot.png"
            command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                       "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}",
                       f"--window-size={width},1600", f"--screenshot={shot}", (report / page).as_uri()]  # fmt: skip
            said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stderr
            assert "CONSOLE" not in said, said
            pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
            assert pixels.shape == (1600, width, 3)
            assert (pixels.max(2) < 40).mean() > dark  # the air around a patient
            assert (pixels[:, -8:] > 240).all()  # nothing reaches over the margin
