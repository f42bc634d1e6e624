"""The look of a report: one style sheet, for light and dark, from a phone's width to a desk's.

Colours are variables, so that text, tables and charts change together. The eight of the charts are told apart by people
who see colours differently, after Okabe and Ito (https://jfly.uni-koeln.de/color/).
"""

from __future__ import annotations

from launch.report.trajectory_page import highlight_style
from rollout.trajectory import SpanType

SPAN_CLASSES = {span.value: f"span-{span.value}" for span in SpanType}
"""Span type -> class of its colour in charts."""

_LIGHT = """
  --ground: #fcfcfb; --raised: #ffffff; --sunk: #f3f4f2; --ink: #1a1d21; --soft: #4c535c; --faint: #737b85;
  --line: #e2e4e1; --grid: #e6e8e5; --accent: #0b5d5e; --good: #13734a; --bad: #b3261e; --warn: #8a5a00;
  --good-ground: #e5f4ec; --bad-ground: #fbe9e7; --warn-ground: #fbf0d9;
  --c0: #0a6fb4; --c1: #d1620a; --c2: #0a8f6c; --c3: #b0468c; --c4: #7a6a00; --c5: #5b4bc4; --c6: #4a8fb8; --c7:
  #6b6f76;
  --thought: #0a6fb4; --code-span: #0a8f6c; --answer: #b0468c; --format: #9a8a2a; --observation: #6d5fd0;
  --system: #8b9199; --user: #c0763a;
"""
_DARK = """
  --ground: #14171a; --raised: #1a1e22; --sunk: #20252a; --ink: #e8eaed; --soft: #b4bbc4; --faint: #8b939d;
  --line: #2e343a; --grid: #2a3036; --accent: #6fd0cc; --good: #6fd6a1; --bad: #ff8f84; --warn: #f0c060;
  --good-ground: #15332a; --bad-ground: #3d2220; --warn-ground: #3a2f18;
  --c0: #5cb3ee; --c1: #f59a4c; --c2: #45c9a0; --c3: #e58ac4; --c4: #cdbb45; --c5: #a598ff; --c6: #8cc7e8; --c7:
  #a4abb3;
  --thought: #5cb3ee; --code-span: #45c9a0; --answer: #e58ac4; --format: #cdbb45; --observation: #a598ff;
  --system: #a4abb3; --user: #f0a878;
"""

_RULES = """
* { box-sizing: border-box; }
html { scroll-padding-top: 3.5rem; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", sans-serif; overflow-wrap: break-word; }
main, .top, footer { max-width: 74rem; margin: 0 auto; padding: 0 1.25rem; }
h1 { font-size: clamp(1.6rem, 4vw, 2.3rem); line-height: 1.15; letter-spacing: -.02em; margin: .45rem 0 .6rem;
  overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; letter-spacing: -.01em; margin: 0 0 .3rem; }
h3 { font-size: 1.02rem; margin: 1.9rem 0 .5rem; }
p { margin: .4rem 0 .8rem; } a { color: var(--accent); }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
.lead { font-size: 1.12rem; color: var(--soft); max-width: 52rem; } .lead b { color: var(--ink); }
.intro, .note { color: var(--soft); max-width: 52rem; } .note { font-size: .88rem; color: var(--faint); }
.top { padding-top: 2.2rem; }
.eyebrow { display: flex; flex-wrap: wrap; gap: .3rem .9rem; align-items: center; color: var(--faint); font-size:
  .88rem; }
.pill { border-radius: 99px; padding: .1rem .7rem; font-weight: 600; font-size: .82rem; }
.pill.good { color: var(--good); background: var(--good-ground); } .pill.bad { color: var(--bad);
  background: var(--bad-ground); } .pill.warn { color: var(--warn); background: var(--warn-ground); }
.notice { border-left: 3px solid var(--warn); background: var(--warn-ground); padding: .6rem .9rem; border-radius: 0
  6px 6px 0;
  margin: 1rem 0; overflow-wrap: anywhere; } .notice.bad { border-color: var(--bad); background: var(--bad-ground); }
.notice p { margin: 0; }
nav { position: sticky; top: 0; z-index: 2; background: var(--ground); border-bottom: 1px solid var(--line);
  margin-top: 1.4rem; }
nav ul { display: flex; gap: 1.2rem; max-width: 74rem; margin: 0 auto; padding: .55rem 1.25rem; list-style: none;
  overflow-x: auto; white-space: nowrap; scrollbar-width: none; }
nav a { color: var(--soft); text-decoration: none; font-size: .9rem; } nav a:hover, nav a:focus { color:
  var(--accent); }
section.part { padding: 2.2rem 0 .6rem; } section.part + section.part { border-top: 1px solid var(--line); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .8rem; margin: 1.5rem 0
  .2rem; }
.tile { background: var(--raised); border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem; min-width:
  0; }
.tile b { display: block; font-size: 1.65rem; line-height: 1.2; letter-spacing: -.02em; font-variant-numeric:
  tabular-nums; }
.tile span { display: block; font-size: .82rem; color: var(--soft); } .tile i { display: block; font-style: normal;
  font-size: .8rem; color: var(--faint); } .tile.main b { color: var(--accent); }
.wide { overflow-x: auto; margin: .6rem 0 1rem; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; min-width: 40%; }
th, td { padding: .42rem .9rem .42rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); font-size: .82rem; vertical-align: bottom; }
th.n, td.n { text-align: right; white-space: nowrap; padding-left: .9rem; padding-right: .9rem; } td:first-child {
  min-width: 9rem; } details.config { margin-top: 1.4rem; }
td.n .spark { display: block; margin: .25rem 0 0 auto; }
.scores td:first-child { white-space: nowrap; font-weight: 600; padding-right:
  1.4rem; }
.scores td.n b { font-size: 1.06rem; } .scores td.n i { font-style: normal; color: var(--faint); font-size: .8rem; }
td .message { font-family: ui-monospace, monospace; font-size: .82rem; overflow-wrap: anywhere; white-space: pre-wrap;
  display: block; max-width: 44rem; max-height: 9rem; overflow-y: auto; unicode-bidi: isolate; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.4rem; margin: .8rem 0; }
dl.facts dt { color: var(--faint); } dl.facts dd { margin: 0; overflow-wrap: anywhere; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .84rem; line-height: 1.5; unicode-bidi:
  isolate; }
pre.block { background: var(--sunk); border-radius: 8px; padding: .8rem 1rem; max-height: 34rem; overflow: auto; }
details > summary { cursor: pointer; } details > summary:focus-visible { outline: 2px solid var(--accent); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1.6rem 2.6rem; }
.chart { margin: .8rem 0; min-width: 0; } figcaption { display: flex; flex-wrap: wrap; gap: 0 .7rem; align-items:
  baseline; }
figcaption b { font-size: .98rem; } .unit { color: var(--faint); font-size: .84rem; }
svg { display: block; overflow: visible; } svg text { font-size: .76rem; fill: var(--faint);
  font-variant-numeric: tabular-nums; }
.frame { display: grid; grid-template-columns: 3.1rem 1fr; grid-template-rows: 13rem 1.3rem auto; margin-top: .7rem; }
.frame .plot, .frame .xaxis { width: calc(100% - .9rem); } .plot, .yaxis { height: 100%; }
.yaxis { width: calc(100% - .5rem); } .yaxis text { text-anchor: end; }
.xaxis { grid-column: 2; height: 1.3rem; padding-top: .2rem; } .xaxis text, .scale text { text-anchor: middle; }
svg text.first { text-anchor: start; } svg text.last { text-anchor: end; }
.xlabel { grid-column: 2; text-align: center; color: var(--faint); font-size: .8rem; padding-top: .15rem; }
line.grid { stroke: var(--grid); stroke-width: 1; shape-rendering: crispEdges; }
polyline.line { fill: none; stroke: var(--colour); stroke-width: 1.6; vector-effect: non-scaling-stroke;
  stroke-linejoin: round; opacity: .9; } polyline.strong { stroke-width: 2.6; opacity: 1; }
.dot { fill: var(--colour); } .whisker { stroke: var(--colour); stroke-width: 2; stroke-linecap: round; }
.fill { fill: var(--colour); } .ground { fill: var(--sunk); }
.hit rect { fill: transparent; } .hit line { stroke: var(--faint); stroke-width: 1; opacity: 0; }
.hit:hover line { opacity: .7; }
.legend, .parts { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; list-style: none; padding: 0; margin: .5rem 0 0;
  font-size: .86rem; color: var(--soft); }
.swatch { display: inline-block; width: .7rem; height: .7rem; border-radius: 3px; background: var(--colour);
  margin-right: .4rem; }
.parts { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); } .parts li { display: flex;
  align-items: baseline; gap: .4rem; } .parts i:last-child { font-style: normal; color: var(--faint); }
.stack { width: 100%; height: 1.6rem; margin: .7rem 0 .2rem; border-radius: 4px; overflow: hidden; }
.bar { width: 100%; min-width: 5rem; height: .65rem; align-self: center; } td .bar { width: 9rem; margin-top: .45rem; }
.spark { width: 5.2rem; height: .8rem; }
.rates, .spans { display: grid; gap: .9rem; margin: .8rem 0 1rem; } .spans { gap: .25rem; }
.group { display: grid; grid-template-columns: minmax(6rem, 11rem) 1fr; gap: 0 1.2rem; }
.group .label { font-weight: 600; font-size: .92rem; overflow-wrap: anywhere; }
.rate { display: grid; grid-template-columns: 10.5rem 1fr 11rem; gap: .9rem; align-items: center; min-height: 1.5rem; }
.rate.alone { grid-template-columns: 1fr 11rem; }
.rate .who { color: var(--soft); font-size: .86rem; overflow-wrap: anywhere; } .rate .value { font-size: .88rem;
  font-variant-numeric: tabular-nums; } .rate .value i { color: var(--faint); font-style: normal; }
.track { width: 100%; height: 1.5rem; } .scale { width: 100%; height: 1.2rem; }
.axis .value { color: var(--faint); font-size: .8rem; }
.sample { border: 1px solid var(--line); border-radius: 8px; background: var(--raised); margin: .45rem 0; }
.sample > summary { display: grid; grid-template-columns: 1.4rem minmax(0, 1fr) auto; gap: .2rem .6rem; padding:
  .55rem .8rem;
  list-style: none; align-items: baseline; } .sample > summary::-webkit-details-marker { display: none; }
.sample[open] > summary { border-bottom: 1px solid var(--line); }
.asked { unicode-bidi: isolate; } .sample .facts, .step .facts { color: var(--faint); font-size: .82rem; }
.verdict { font-weight: 700; } .verdict.right { color: var(--good); } .verdict.wrong, .verdict.failed { color:
  var(--bad); }
.episode { padding: .4rem .9rem 1rem; } .episode > details { margin: .4rem 0; font-size: .88rem; color: var(--soft); }
.episode > details pre { padding: .4rem .8rem; }
.step { margin-top: .9rem; padding-left: .9rem; border-left: 3px solid var(--line); }
.step > header { display: flex; flex-wrap: wrap; gap: .1rem .8rem; align-items: baseline; font-size: .88rem; }
.kind { font-size: .78rem; color: var(--soft); border: 1px solid var(--line); border-radius: 99px; padding: 0 .55rem; }
.kind.bad { color: var(--bad); background: var(--bad-ground); border-color: transparent; }
.kind.chosen { color: var(--good); background: var(--good-ground); border-color: transparent; }
.thought { white-space: pre-wrap; margin: .3rem 0; overflow-wrap: anywhere; unicode-bidi: isolate; }
.format { color: var(--faint); font-size: .76rem; font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
pre.code { background: var(--sunk); border-radius: 6px; padding: .55rem .8rem; margin: .25rem 0; max-height: 26rem;
  overflow: auto; }
.said { margin: .5rem 0; } .said .tag { display: block; font-size: .76rem; color: var(--faint); }
.said pre { max-height: 22rem; overflow: auto; } .said.question pre, .said.answer pre { font: inherit; }
.said.observation pre { border-left: 3px solid var(--observation); padding-left: .7rem; color: var(--soft); }
.said.bad pre { border-color: var(--bad); }
.candidates { padding-left: 1.2rem; font-size: .88rem; } .candidates li { margin: .5rem 0; }
.candidates header { display: flex; flex-wrap: wrap; gap: .1rem .7rem; } .candidates pre { background: var(--sunk);
  padding: .4rem .7rem; border-radius: 6px; margin: .2rem 0; max-height: 14rem; overflow: auto; }
.candidates p { margin: 0; } .candidates pre.observation { border-left: 3px solid var(--observation); }
dl.end { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 1rem 0 0; font-size: .88rem;
  border-top: 1px solid var(--line); padding-top: .7rem; }
dl.end dt { color: var(--faint); } dl.end dd { margin: 0; overflow-wrap: anywhere; unicode-bidi: isolate;
  max-height: 10rem; overflow-y: auto; }
footer { color: var(--faint); font-size: .85rem; padding-top: 2rem; padding-bottom: 3rem; }
@media (max-width: 46rem) {
  body { font-size: 15px; } main, .top, footer { padding-left: 1rem; padding-right: 1rem; } .top { padding-top:
  1.3rem; }
  nav ul { padding-left: 1rem; padding-right: 1rem; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .6rem; } .tile { padding: .6rem .75rem; }
  .tile b { font-size: 1.35rem; }
  .group { grid-template-columns: 1fr; gap: .2rem; }
  .rate, .rate.alone { grid-template-columns: 1fr auto; gap: 0 .7rem; } .rate .who { grid-column: 1; }
  .rate .value { grid-column: 2; grid-row: 1; text-align: right; } .rate .track, .rate .bar, .rate .scale {
  grid-column: 1 / -1; } .rate .bar { margin: .2rem 0 .5rem; } .rate.axis .value { display: none; }
  .rate.alone .value { grid-column: 1; text-align: left; }
  dl.facts, dl.end { grid-template-columns: 1fr; gap: 0; } dl.facts dd, dl.end dd { margin-bottom: .5rem; }
  .frame { grid-template-rows: 11rem 1.3rem auto; } .sample > summary { grid-template-columns: 1.2rem minmax(0, 1fr); }
  .sample > summary .facts { grid-column: 2; }
}
@media print { nav { display: none; } .sample { break-inside: avoid; } }
"""


def style_sheet() -> str:
    """All of it, to be put into a page as it is."""
    colours = "\n".join(f".s{i} {{ --colour: var(--c{i}); }}" for i in range(8))
    spans = "\n".join(
        f".{name} {{ --colour: var(--{'code-span' if span == 'code' else span}); }}"
        for span, name in SPAN_CLASSES.items()
    )
    return (
        f":root {{ color-scheme: light dark; {_LIGHT} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}\n"
        f"{_RULES}\n{colours}\n{spans}\n.strong-line {{ --colour: var(--ink); }}\n"
        f".muted {{ --colour: var(--faint); }}\n"
        f".bad-fill {{ --colour: var(--bad); }}\n.good-fill {{ --colour: var(--good); }}\n"
        f"{highlight_style(dark=False)}\n"
        f"@media (prefers-color-scheme: dark) {{\n{highlight_style(dark=True)}\n}}\n"
    )
