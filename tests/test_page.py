"""The report's page in a real browser, its file, and what bad input gets on the command line."""

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PARITY, make
from report_helpers import ATTACK, HOSTILE, hostile_model, hostile_tokenizer

from tl_looped import InputError, LoopedModel
from tl_looped.__main__ import _parser, main
from tl_looped.claims.architectures import INITIALISATION_WORDS, LAYERS
from tl_looped.dynamics.tokens import N_LOOPS
from tl_looped.engine.files import check_output, write_whole
from tl_looped.lens import logit_lens, view_prompt
from tl_looped.report import Prompt, ReportData, built_in, collect, report_page
from tl_looped.report import commands as commands_module
from tl_looped.report.analyses import LONG_RUN
from tl_looped.report.html import Section, page
from tl_looped.viz import LayerAttention, LoopAttention
from tl_looped.viz.style import show_token

# Files.


def test_a_file_is_written_whole(tmp_path: Path):
    target = tmp_path / "report.html"
    target.write_text("old")
    (tmp_path / "link.html").symlink_to(target)
    assert write_whole(tmp_path / "link.html", "new ü") == target
    assert target.read_text(encoding="utf-8") == "new ü"
    assert (tmp_path / "link.html").is_symlink()
    (tmp_path / "plain").touch()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode  # not the private mode of a temporary file


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "report.html"
    target.write_text("old")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match=r"can't be written: \[Errno 28\] No space left"):
        write_whole(target, "new")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "is a folder"),
        ("folder", "is a folder"),
        ("missing/report.html", "there is no folder"),
        ("file/report.html", "there is no folder"),
        ("n" * 300, "can't be written"),
        ("a\0b", "can't be written"),
        ("/dev/null", "is not a regular file"),
        ("/proc/report.html", "can't be written"),
    ],
)
def test_output_paths_that_can_not_be_written(path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=message):
        check_output(path)


def test_a_read_only_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # for root, every file is writable
    with pytest.raises(InputError, match="is a read-only file"):
        check_output(tmp_path / "file")


# The command line.


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed to stderr, without progress bars."""
    return capsys.readouterr().err.rpartition("\r")[2].strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n-loops", "0"], "--n-loops must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--tokens", "1,x"], "--tokens must be integers with commas between"),
        (["--prompt", "a", "b", "--answer", "c"], "2 prompts but 1 answers"),
        (["--answer", "c"], "0 prompts but 1 answers"),
        (["--out", "missing/report.html"], "there is no folder"),
    ],
)
def test_bad_arguments_are_told_before_a_model_is_loaded(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(LoopedModel, "from_pretrained", lambda *_: pytest.fail("the model was loaded"))
    assert main(["report", *arguments]) == 2
    error = told(capsys)
    assert message in error
    assert error.startswith("tl-looped: ")
    assert "\n" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no-such-model"], "no folder, no hub id"),
        (["--model", str(PARITY)], "has no config.json"),
        (["--model", str(PARITY / "ouro")], "no tokenizer, so it can't read the built-in prompts: give --tokens"),
        (["--model", str(PARITY / "ouro"), "--prompt", "hi"], "no tokenizer"),
        (["--model", str(PARITY / "ouro"), "--tokens", "1,99999"], "out of the vocabulary"),
    ],
)
def test_models_and_prompts_that_do_not_fit(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    assert main(["report", "--out", str(tmp_path / "report.html"), *arguments]) == 2
    error = told(capsys)
    assert message in error
    assert "\n" not in error
    assert list(tmp_path.iterdir()) == []


def test_built_in_prompts_that_the_tokenizer_can_not_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = make(tokenizer=hostile_tokenizer(), d_vocab=17)
    monkeypatch.setattr(LoopedModel, "from_pretrained", lambda *_: model)
    assert main(["report", "--model", "a/b", "--out", str(tmp_path / "report.html")]) == 2
    assert "the built-in prompts do not suit this model, so give --prompt" in told(capsys)


@pytest.mark.usefixtures("as_a_user")
def test_report_command_writes_the_page(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    target = tmp_path / "report.html"
    folder = str(PARITY / "huginn")
    asked = ["--tokens", "1,2,3", "4,5", "--answer", "7", "8", "--n-loops", "2", "--seed", "3"]
    assert main(["report", "--model", folder, "--out", str(target), *asked]) == 0
    assert capsys.readouterr().out.startswith(f"Wrote {target}")
    text = target.read_text(encoding="utf-8")
    assert f"tl-looped report --model {folder} --out {target} --tokens 1,2,3 4,5 --answer 7 8" in text
    assert "<h1>huginn: 2 prompts, read loop by loop</h1>" in text
    assert "Prompt 2 of 2: tokens 4,5" in text
    assert "seed 3" in text
    assert "3 tokens (as ids: the model has no tokenizer) with their positions" in text


def test_built_in_prompts_are_for_models_by_name(monkeypatch: pytest.MonkeyPatch):
    model = make(tokenizer=hostile_tokenizer(), d_vocab=17)
    monkeypatch.setattr(model, "to_tokens", lambda text: None)
    for name in ("looped-hops", "looped-hops-settling"):
        assert commands_module._built_in(model, name) == built_in(name)


@pytest.mark.parametrize("arguments", [[], ["report"], ["check"]])
def test_commands_have_help(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--help"])
    assert ended.value.code == 0
    assert " ".join(["usage: tl-looped", *arguments]) in capsys.readouterr().out


def test_defaults_are_the_analyses_own():
    options = _parser().parse_args(["study", "architectures"])
    assert tuple(options.layers) == LAYERS
    assert options.n_loops == N_LOOPS
    assert tuple(options.init) == tuple(INITIALISATION_WORDS)
    assert _parser().parse_args(["report"]).long_run == LONG_RUN


def test_help_does_not_wait_for_torch():
    code = "import sys; sys.argv[1:] = ['--help']\ntry: main()\nexcept SystemExit: print('torch' in sys.modules)"
    code = f"from tl_looped.__main__ import main\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "tl_looped", "check", "a\nb"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("tl-looped: 'a\\nb' is no folder")


# The page.


@pytest.fixture(scope="module")
def hostile_data() -> ReportData:
    prompts = [Prompt("The square root of 16 is", answer=" 4"), Prompt("The" + "".join(HOSTILE), note=ATTACK)]
    return collect(hostile_model(), prompts)


@pytest.fixture(scope="module")
def hostile_page(hostile_data: ReportData) -> str:
    return report_page(hostile_data, f"tl-looped report --prompt '{ATTACK}'", [Section(f"Extra {ATTACK}", "<p>Hi</p>")])


def test_bundles_are_in_the_page_once(hostile_page: str):
    assert hostile_page.count("* plotly.js v") == 1
    assert hostile_page.count("var CircuitsVis=") == 1
    assert len(hostile_page) < 8_000_000


def test_page_asks_for_nothing(hostile_page: str):
    ours = re.sub(r"<script nonce=.*?</script>", "", hostile_page, flags=re.DOTALL)
    assert re.findall(r'(?:src|href|srcset|action|data)="(?!#|data:)[^"]*"', ours) == []
    assert "@import" not in ours
    assert "url(" not in ours.replace("url(#tl-head-", "")  # arrow heads, in the drawing itself
    assert "default-src 'none'" in ours
    assert "sourceMappingURL" not in hostile_page


def test_page_has_no_tag_from_a_prompt(hostile_page: str):
    assert "<img" not in re.sub(r"<script nonce=.*?</script>", "", hostile_page, flags=re.DOTALL)
    assert len(re.findall("<script nonce=", hostile_page)) == 3


def test_page_says_what_made_it(hostile_page: str):
    whole = ("transformer-lens", "circuitsvis", "not needed: this model draws nothing at random", "No answer was given")
    assert [said for said in (*whole, "<h2>Extra") if said not in hostile_page] == []


def test_sections_have_their_own_anchors():
    text = page("T", "", [Section("A b", "1"), Section("a B!", "2"), Section("…", "3", collapsed=True)])
    assert re.findall(r'<section id="([^"]*)"', text) == ["a-b", "a-b-2", "section"]
    assert re.findall(r'<li><a href="#([^"]*)"', text) == ["a-b", "a-b-2", "section"]
    assert "<details>" in text


def test_no_two_pages_share_their_nonce():
    first, second = (re.search("nonce-([^']+)'", page("T", "", []))[1] for _ in range(2))
    assert first != second


# The page in a browser.


def _browser_reason() -> str:
    if importlib.util.find_spec("selenium") is None:
        return "selenium is not installed: pip install '.[test]'"
    if not _chromium() or not shutil.which("chromedriver"):
        return "no Chromium with its driver here: install Debian's packages chromium and chromium-driver"
    return ""


def _chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


browser_test = pytest.mark.skipif(bool(_browser_reason()), reason=_browser_reason() or "none")


@pytest.fixture(scope="module")
def driver(hostile_page: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium without a network, with the page open in it."""
    from selenium import webdriver

    folder = tmp_path_factory.mktemp("browser")
    (folder / "report.html").write_text(hostile_page, encoding="utf-8")
    options = webdriver.ChromeOptions()
    options.binary_location = _chromium() or ""
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
        *("disable-component-update", "disable-sync", "disable-dev-shm-usage", "disable-extensions"),
        *("window-size=1200,1000", f"user-data-dir={folder / 'profile'}", "host-resolver-rules=MAP * ~NOTFOUND"),
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    chrome = webdriver.Chrome(options=options, service=service)
    try:
        chrome.command_executor.client_config.timeout = 400  # the cores may be shared
        chrome.set_page_load_timeout(300)
        chrome.set_script_timeout(300)
        chrome.get((folder / "report.html").as_uri())
        yield chrome
    finally:
        with contextlib.suppress(Exception):
            chrome.quit()


def wait_for(driver: Any, script: str) -> None:
    """Wait until a JavaScript expression is true."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 120).until(lambda d: d.execute_script(f"return Boolean({script})"), script)


@browser_test
def test_all_plots_are_drawn(driver: Any, hostile_page: str):
    n_plots = hostile_page.count('class="plot"')
    assert n_plots == 10  # five for each prompt
    wait_for(driver, f"document.querySelectorAll('.js-plotly-plot .main-svg').length >= {n_plots}")
    drawn = driver.execute_script(
        "return [...document.querySelectorAll('.plot')].map(plot => [plot.data.length, "
        "plot.querySelectorAll('.scatterlayer .trace, .heatmaplayer .hm').length, plot.clientHeight])"
    )
    assert len(drawn) == n_plots
    for traces, marks, height in drawn:
        assert marks >= min(traces, 2)
        assert height > 200


@browser_test
def test_attention_is_drawn_and_keeps_its_head_when_the_loop_changes(driver: Any):
    views = driver.execute_script("return document.querySelectorAll('.tl-loop-attention').length")
    assert views == 2
    wait_for(
        driver, "[...document.querySelectorAll('.tl-heads')].every(e => e.querySelectorAll('canvas').length === 5)"
    )
    wait_for(driver, "[...document.querySelectorAll('.tl-heads canvas')].every(c => c.clientWidth > 20)")
    driver.execute_script("document.querySelectorAll('.tl-heads h4')[2].parentElement.parentElement.click()")
    wait_for(driver, "document.querySelector('.tl-heads').textContent.includes('Head 2 Zoomed')")
    driver.execute_script(
        "const slider = document.querySelector('.tl-picker input'); slider.value = 3;"
        "slider.dispatchEvent(new Event('input'))"
    )
    assert driver.execute_script("return document.querySelector('.tl-picker output').textContent") == "3"
    wait_for(driver, "document.querySelector('.tl-heads').textContent.includes('Head 2 Zoomed')")
    driver.execute_script(
        "const pick = document.querySelector('.tl-picker select'); pick.value = 0;"
        "pick.dispatchEvent(new Event('change'))"
    )
    wait_for(driver, "document.querySelector('.tl-picker output').textContent === 'runs once'")
    assert driver.execute_script("return document.querySelector('.tl-picker input').disabled")


@browser_test
def test_page_shows_hostile_text_and_does_not_run_it(driver: Any):
    assert driver.execute_script("return window.attacked") is None
    assert driver.execute_script("return document.images.length") == 0
    shown = driver.execute_script("return document.body.innerText")
    assert ATTACK in shown
    labels = driver.execute_script("return [...document.querySelectorAll('.xtick text')].map(e => e.textContent)")
    assert "·</script><im…" in labels
    assert "·&amp;" in labels


@browser_test
def test_nothing_overflows_the_page(driver: Any):
    assert driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


@browser_test
def test_nothing_is_asked_of_a_network_and_the_console_is_quiet(driver: Any):
    names = driver.execute_script("return performance.getEntries().map(entry => entry.name)")
    assert [name for name in names if re.match(r"\w+://", name) and not name.startswith("file://")] == []
    sent = [entry["message"] for entry in driver.get_log("performance") if "requestWillBeSent" in entry["message"]]
    urls = [re.search(r'"url":"([^"]*)"', message)[1] for message in sent]
    assert {url.partition(":")[0] for url in urls} <= {"file", "data", "blob", "chrome"}  # chrome: its own first page
    assert driver.get_log("browser") == []


@browser_test
def test_attention_view_draws_itself_without_the_page(driver: Any, tmp_path: Path):
    """As in a notebook, where each view brings its own code."""
    pattern = torch.ones(2, 3, 4, 4).tril()
    view = LoopAttention(["a", "b", "c", ATTACK], [LayerAttention("blocks", 0, (0, 1), pattern)])
    shown = view._repr_html_() + view._repr_html_()
    (tmp_path / "notebook.html").write_text(f'<meta charset="utf-8"><body>{shown}', encoding="utf-8")
    driver.get((tmp_path / "notebook.html").as_uri())
    wait_for(driver, "document.querySelectorAll('.tl-heads canvas').length === 8")
    assert driver.execute_script("return document.querySelectorAll('.tl-picker').length") == 2
    assert driver.execute_script("return window.attacked") is None
    assert driver.get_log("browser") == []


@browser_test
def test_token_views_draw_themselves_without_the_page(driver: Any, tmp_path: Path):
    """circuitsvis takes tokens as HTML: theirs must come out as text."""
    from selenium.webdriver.common.action_chains import ActionChains

    model = hostile_model()
    tokens = torch.arange(model.cfg.d_vocab)[None]
    views = view_prompt(model, tokens, 3), logit_lens(model, tokens, 3, positions=None).view_top_tokens()
    shown = "".join(view._repr_html_() for view in (*views, *views))
    (tmp_path / "tokens.html").write_text(f'<meta charset="utf-8"><body>{shown}', encoding="utf-8")
    driver.get((tmp_path / "tokens.html").as_uri())
    wait_for(driver, "document.querySelectorAll('.tl-tokens table').length === 2")
    prompts = "[...document.querySelectorAll('.tl-tokens')].filter(view => view.querySelector('.tl-picker'))"
    spans = f"{prompts}[0].querySelectorAll('span > span')"
    texts = driver.execute_script(f"return [...{spans}].map(span => span.textContent)")
    wanted = [show_token(token).replace(" ", "\u00a0") for token in model.to_str_tokens(tokens)[1:]]
    assert texts == wanted
    colors = f"[...{spans}].map(span => span.style.backgroundColor).join()"
    before = driver.execute_script(f"return {colors}")
    choice = driver.execute_script(f"return {prompts}[0].querySelector('input')")
    driver.execute_script("arguments[0].value = 0; arguments[0].dispatchEvent(new Event('input'))", choice)
    wait_for(driver, f"{spans}.length === {len(wanted)} && {colors} !== {before!r}")
    assert driver.execute_script(f"return {prompts}[0].querySelector('output').textContent") == "0"
    ActionChains(driver).move_to_element(driver.execute_script(f"return {spans}[3]")).perform()
    wait_for(driver, f"{prompts}[0].querySelector('table')")  # the top tokens, while the mouse is over one
    assert driver.execute_script("return window.attacked") is None
    assert driver.get_log("browser") == []
