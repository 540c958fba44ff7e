"""What the documentation says that can be compared with the program."""

import re
from pathlib import Path

import pytest

from biomedlm_jax import config
from biomedlm_jax.finetune_config import FinetuneConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("*/README.md"))]
GROUPS = "|".join(vars(config.Config()) | vars(FinetuneConfig()))
# A function, and a mistake whose message is shown.
NO_SETTINGS = {"optimizer.clip_by_known_norm", "train.stesp"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_what_there_is(page):
    text = page.read_text()
    assert not re.findall(r"@[A-Z_]+@|\bTODO\b|\bXXX\b", text), "something was to be filled in"
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        assert "://" in link or (page.parent / link).exists(), link
    settings = set(re.findall(rf"(?<![\w./])(?:--)?((?:{GROUPS})\.[a-z_0-9]+)\b(?![.(/])", text))
    modules = {name for name in settings if (ROOT / "biomedlm_jax" / name).exists()}
    known = {*config._setting_names(config.Config), *config._setting_names(FinetuneConfig)}
    assert settings - modules - NO_SETTINGS <= known
