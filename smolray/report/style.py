"""The style sheet of the report: light and dark, no font file, nothing to fetch."""

STYLE = """
:root { color-scheme: light dark; --bg: #fbfbfa; --panel: #fff; --text: #1f2328; --quiet: #667079; --rule: #e3e5e8;
  --c0: #2f6fb3; --c1: #c4581b; --c2: #2f8556; --c3: #8250a8; --c4: #9a6b00; --c5: #b23a6c; --right: #1f7a45; --wrong: #b3361f; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171a; --panel: #1c2024; --text: #e4e7ea; --quiet: #98a2ab; --rule: #31373d;
  --c0: #6aaae8; --c1: #f0935a; --c2: #65c28e; --c3: #bd93dd; --c4: #d8ab45; --c5: #e583ab; --right: #6fcf97; --wrong: #f08a75; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--text); font: 15px/1.5 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 14px; font-weight: 650; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 14px; font-weight: 620; }
section { background: var(--panel); border: 1px solid var(--rule); border-radius: 10px; padding: 20px 22px; margin-top: 18px; }
.badge { font-size: 12.5px; font-weight: 550; vertical-align: 5px; padding: 2px 10px; border-radius: 20px; border: 1px solid var(--rule);
  color: var(--quiet); }
.badge.finished { color: var(--right); border-color: currentColor; } .badge.failed { color: var(--wrong); border-color: currentColor; }
dl { display: flex; flex-wrap: wrap; gap: 10px 32px; margin: 0; } dt { color: var(--quiet); font-size: 12.5px; } dd { margin: 0;
  overflow-wrap: anywhere; }
.quiet { color: var(--quiet); margin: 0 0 12px; }
.top { display: grid; grid-template-columns: minmax(200px, 1fr) 2fr; gap: 28px; align-items: start; }
.headline b { display: block; font-size: 44px; line-height: 1.1; font-weight: 650; font-variant-numeric: tabular-nums; }
.headline span { color: var(--quiet); font-size: 13.5px; } .headline.beside { margin-top: 14px; } .headline.beside b { font-size: 24px;
  font-weight: 550; color: var(--quiet); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 6px 10px 6px 0; border-bottom: 1px solid var(--rule); font-weight: 400; }
thead th { color: var(--quiet); font-size: 12.5px; } tr.all th, tr.all td { font-weight: 620; }
tbody tr:last-child > * { border-bottom: 0; }
td.bar { width: 45%; padding-right: 0; } td.bar i { display: block; height: 8px; border-radius: 4px; background: var(--c0);
  min-width: 1px; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px 36px; margin-top: 20px; padding-top: 16px; border-top: 1px solid var(--rule); }
.tiles:empty { display: none; }
.tile b { display: block; font-size: 18px; font-weight: 600; font-variant-numeric: tabular-nums; } .tile span { color: var(--quiet);
  font-size: 12.5px; }
.charts { display: grid; grid-template-columns: 1fr 1fr; gap: 22px 26px; } .chart { margin: 0; min-width: 0; }
.chart:first-child { grid-column: 1 / -1; }
.chart svg { width: 100%; height: auto; display: block; } figcaption { font-size: 13.5px; font-weight: 550; }
.grid { stroke: var(--rule); } .axis { stroke: var(--rule); } .tick { fill: var(--quiet); font-size: 12px; }
.chart:not(:first-child) .tick { font-size: 17px; }
.line { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; } .chart:not(:first-child) .line { stroke-width: 2.6;
  } .line.faint { stroke-width: 1; opacity: .4; }
.dot { fill: currentColor; } .mark { stroke: var(--c5); stroke-width: 1.5; stroke-dasharray: 3 4; } .baseline { stroke: var(--quiet);
  stroke-dasharray: 7 5; }
.s0 { color: var(--c0); } .s1 { color: var(--c1); } .s2 { color: var(--c2); } .s3 { color: var(--c3); } .s4 { color: var(--c4); }
.s5 { color: var(--c5); }
.faint + .line, .key.faint + .key { color: var(--c0); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 12.5px; margin-bottom: 2px; } .key { color: var(--quiet); }
.key::before { content: ""; display: inline-block; width: 16px; height: 0; border-top: 2px solid; vertical-align: 4px; margin-right: 6px;
  }
.key.s0::before { color: var(--c0); } .key.s1::before { color: var(--c1); } .key.s2::before { color: var(--c2); }
.key.s3::before { color: var(--c3); }
.key.s4::before { color: var(--c4); } .key.s5::before { color: var(--c5); } .key.faint::before { opacity: .4; }
.key.faint + .key::before { color: var(--c0); }
.key.restarts::before { color: var(--c5); border-top-style: dashed; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(225px, 1fr)); gap: 14px; }
.card { border: 1px solid var(--rule); border-radius: 8px; overflow: hidden; } .card img { width: 100%; height: 160px;
  object-fit: contain; background: var(--bg); display: block; image-rendering: auto; }
.card ul { list-style: none; margin: 0; padding: 10px 12px; display: grid; gap: 9px; font-size: 13.5px; }
.card li { overflow-wrap: anywhere; }
.question { color: var(--quiet); } .right, .wrong { font-size: 12px; font-weight: 600; white-space: nowrap; }
.right { color: var(--right); } .wrong { color: var(--wrong); }
.truth { font-weight: 550; }
summary { cursor: pointer; font-weight: 600; } details[open] summary { margin-bottom: 12px; }
pre { overflow-x: auto; font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; margin: 0; }
.events { font: 12.5px/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; } .events td { padding: 3px 14px 3px 0;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.events td:first-child { color: var(--quiet); white-space: nowrap; } .events tr.resume td { color: var(--c5); }
@media (max-width: 720px) { .top, .charts { grid-template-columns: 1fr; } }
@media print { section { break-inside: avoid; } }
"""
