"""Output of commands becomes HTML: colours are classes, everything else is text."""

from smolray.web.terminal import terminal_html


def test_colours_become_classes_and_text_is_escaped():
    text = "plain <b>\x1b[1;32m«a & b»\x1b[0m \x1b[36m<image 1>\x1b[0m\x1b[2K\x1b[1mbold\x1b[2mdim"
    assert terminal_html(text) == (
        'plain &lt;b&gt;<span class="t-bold t-green">«a &amp; b»</span> <span class="t-cyan">&lt;image 1&gt;</span>'
        '<span class="t-bold">bold</span><span class="t-bold t-dim">dim</span>'
    )
    assert terminal_html("\x1b[38;5;3m<script>\x1b[m") == "&lt;script&gt;"
    assert terminal_html("") == ""
