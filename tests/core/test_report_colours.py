"""The colours of the report's page: text and curves stand out from what is behind them, light and dark."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSS = (Path(__file__).resolve().parents[2] / "core" / "report" / "page.css").read_text()


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    values = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, contrast ratio."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def themes() -> dict[str, dict[str, str]]:
    """Custom properties of light, dark and print."""
    blocks = re.findall(r":root\{([^}]*)\}", CSS)
    assert len(blocks) == 3
    found = [dict(re.findall(r"--([a-z0-9-]+):(#[0-9a-f]{6})", block)) for block in blocks]
    assert all(theme.keys() == found[0].keys() for theme in found)
    return dict(zip(("light", "dark", "print"), found, strict=True))


def test_contrast_is_computed_as_the_standard_has_it() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", ["light", "dark", "print"])
def test_text_and_curves_stand_out(theme: str) -> None:
    """WCAG AA: 4.5 for text, 3 for what is drawn."""
    colours = themes()[theme]
    for background in ("bg", "soft"):
        for text in ("fg", "dim", "good", "doubtful", "bad", "open"):
            assert contrast(colours[text], colours[background]) >= 4.5, (text, background)
    for zone in ("z0", "z1", "z2", "z3"):
        assert contrast(colours["fg"], colours[zone]) >= 4.5, zone
    for curve in ("val", "probe", "train", "base", "best", "named"):
        assert contrast(colours[curve], colours["bg"]) >= 3, curve
    shades = [luminance(colours[f"h{shade}"]) for shade in range(5)]
    assert shades in (sorted(shades), sorted(shades, reverse=True))  # told apart without colour
