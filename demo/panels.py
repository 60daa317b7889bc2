"""The page's own pieces of HTML. Everything that comes from outside is escaped here."""

from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from blockcache.demo import plots
from blockcache.demo.desk import Job
from blockcache.demo.media import Shot
from blockcache.demo.plots import Dot
from blockcache.demo.settings import to_query
from blockcache.demo.shelf import Tuned
from blockcache.demo.visits import Pair, Visit
from blockcache.methods.presets import preset
from blockcache.plan import StaticPolicy, even_steps
from blockcache.tuning.comparison import size
from blockcache.tuning.quality import CAP_DB, Scores

Link = Callable[[str], str]
"""A file of a visit to the address it is served at."""

_LONGEST_SHOWN = 240
_SCHEME_STEPS, _SCHEME_BLOCKS = 30, 6
PSNR_WORDS, SSIM_WORDS = "higher is nearer", "1 is identical"
_ERROR_WORDS = (
    "How near the latents are to those of the uncached run after each step: higher is nearer."
)


def link_to(folder: Path) -> Link:
    """Links to the files of a folder that is served."""
    return lambda name: f"gradio_api/file={quote(f'{folder}/{name}')}"


def link_within(link: Link, pair: Pair) -> Link:
    """Links to the files of one pair."""
    return lambda name: link(f"{pair.id}/{name}")


def header(mode: str) -> str:
    """The head of the page: what this is, and what it runs on."""
    return (
        '<header class="bc-head"><h1>blockcache</h1>'
        "<p>Diffusion pipelines made faster by not doing work again. "
        '<span class="bc-more">See what it buys, and what it costs.</span></p>'
        f'<span class="bc-mode">{escape(mode)}</span></header>'
    )


# ---- while it runs ------------------------------------------------------------------------------


def status(job: Job | None, before: int) -> str:
    """Where a job is; empty without one."""
    if job is None or job.state == "done":
        return ""
    if job.state == "failed":
        return alert(job.error)
    if job.state == "stopped":
        return notice("Stopped. Nothing was kept of it.")
    if job.state == "waiting":
        others = "1 run is" if before == 1 else f"{before} runs are"
        return _bar(f"In the queue: {others} before yours" if before else "Starting", None, "")
    now = job.progress
    steps = f", {now.unit} {now.done} of {now.total}" if now.total else ""
    share = now.done / now.total if now.total else None
    return _bar(f"{now.part}{now.doing}{steps}", share, now.preview)


def _bar(words: str, share: float | None, preview: str) -> str:
    known = "" if share is None else f' value="{share:.3f}"'
    label = escape(words, quote=True)
    picture = f'<img src="{preview}" alt="Preview of the picture so far">' if preview else ""
    return (
        f'<div class="bc-status" role="status"><div class="bc-doing"><span>{label}</span>'
        f'<progress max="1"{known} aria-label="{label}"></progress></div>{picture}</div>'
    )


def alert(words: str) -> str:
    """Something went wrong."""
    return f'<div class="bc-alert" role="alert">{escape(words)}</div>'


def notice(words: str) -> str:
    """Something worth knowing."""
    return f'<div class="bc-notice" role="status">{escape(words)}</div>'


# ---- a pair -------------------------------------------------------------------------------------


def welcome() -> str:
    """What one sees before anything was made: the idea, with the steps of the preset."""
    maps = [
        plots.stripes(computed, _SCHEME_STEPS, _SCHEME_BLOCKS, words)
        for computed, words in (
            (range(_SCHEME_STEPS), "A full grid: all is computed"),
            (_computed_steps("balanced"), "A grid of which only some columns are computed"),
        )
    ]
    return f"""
<div class="bc-welcome">
<p class="bc-lead">The same prompt from the same noise, twice.</p>
<p><b>Uncached</b>: every transformer block in every step.</p>{maps[0]}
<p><b>With the cache</b>: what hardly changes from step to step is reused or predicted.</p>{maps[1]}
<p class="bc-legend"><span>steps run to the right, blocks downwards</span>
<span><i class="bc-computed"></i>computed</span>
<span><i class="bc-reused"></i>not computed</span></p>
<p>It is faster, and it is not the same picture. How much of either is yours to choose: press
<b>Generate both</b> for both pictures, both times, and how far apart they are.</p>
</div>
"""


def _computed_steps(word: str) -> list[int]:
    """Which steps a preset computes."""
    policy = preset(word).rules[0].policy
    if not isinstance(policy, StaticPolicy):
        raise TypeError(f"the preset {word} does not say beforehand what it computes")
    (mask,) = policy.mask(even_steps(_SCHEME_STEPS), 1)
    return [step for step, is_computed in enumerate(mask) if is_computed]


WHY_WELCOME = """
<div class="bc-welcome">
<p class="bc-lead">What happened inside a run.</p>
<p>Which block was computed in which step, how much changed from step to step, how far the picture
moved away, and where the seconds went. Make a comparison under <b>Compare</b> first.</p>
</div>
"""


EXPLORE_WELCOME = """
<div class="bc-welcome">
<p class="bc-lead">All your runs, time against quality.</p>
<p>Each comparison becomes a dot, and the best choices stand out. Make one under <b>Compare</b>,
then try other plans on the same prompt: each of them takes one run only.</p>
</div>
"""


TUNE_WELCOME = """
<div class="bc-welcome">
<p class="bc-lead">Ask for a quality or a speed; get the fastest plan that keeps it.</p>
<ol>
<li>A third of the prompts is traced uncached, and plans are searched on them by real runs.</li>
<li>The fastest plan that is near enough is checked on the other prompts.</li>
<li>You get a plan file that says what was reached, median and worst.</li>
</ol>
<p>Model, size and steps are those of <b>Compare</b>. <b>Stop</b> gives the best plan so far.</p>
</div>
"""


def result(pair: Pair | None, link: Link) -> str:
    """Both pictures, the numbers and the difference."""
    if pair is None:
        return welcome()
    query = escape(to_query(pair.settings, pair.plan), quote=True)
    said_by_engine = "".join(remark(words) for words in pair.story.remarks)
    return (
        f'<section class="bc-result" data-query="{query}">'
        f"{verdict(pair.speedup, likeness(pair.scores, is_video=pair.shot.is_video))}"
        f"{said_by_engine}"
        f"{both(pair.shot, pair.name, pair.settings.prompt, link_within(link, pair), _said(pair))}"
        f"{_numbers(pair)}{_downloads(pair, link)}</section>"
    )


def verdict(speedup: float | None, words: str) -> str:
    """The line above a pair: how much faster, and how alike."""
    speed = "" if speedup is None else f"<b>{_speed(speedup)}</b> "
    return f'<p class="bc-verdict">{speed}{escape(words)}</p>'


def remark(words: str) -> str:
    """What has to be known before the numbers are believed."""
    return f'<p class="bc-notice">{escape(words[:1].upper() + words[1:])}.</p>'


def both(shot: Shot, name: str, prompt: str, link: Link, beside: str) -> str:
    """The pair to look at, and what lies beside it."""
    files = {kind: link(file) for kind, file in shot.files.items()}
    viewer = (
        _players(files, name, prompt)
        if shot.is_video
        else _slider(files["uncached"], files["cached"], name, prompt, shot.size)
    )
    return (
        f'<div class="bc-pair">{viewer}<div class="bc-beside">'
        f"{_difference(shot, files['difference'])}{beside}</div></div>"
    )


def _slider(left: str, right: str, name: str, prompt: str, shape: tuple[int, int]) -> str:
    """Two pictures on top of each other and a border that moves by mouse, finger or arrow keys."""
    about = escape(short(prompt), quote=True)
    wide, high = shape
    return (
        f'<figure class="bc-slider" style="--shape: {wide} / {high}; --wide: {wide / high:.4f}">'
        f'<img src="{left}" alt="Uncached: {about}">'
        f'<img class="bc-over" src="{right}" alt="With {escape(name, quote=True)}: {about}">'
        '<span class="bc-border" aria-hidden="true"></span>'
        '<input type="range" min="0" max="100" value="50" step="0.5" '
        'aria-label="Border between the uncached picture on the left and the cached one on the '
        'right"></figure>'
    )


def _players(files: dict[str, str], name: str, prompt: str) -> str:
    about = escape(short(prompt), quote=True)
    names = {"uncached": "Uncached", "cached": f"With {name}"}
    players = "".join(
        f'<video src="{files[kind]}" poster="{files[f"{kind}_poster"]}" muted loop playsinline '
        'preload="auto" '
        f'aria-label="{escape(name, quote=True)}: {about}"></video>'
        for kind, name in names.items()
    )
    return (
        f'<figure class="bc-players"><div class="bc-screens">{players}</div>'
        '<div class="bc-transport"><button type="button" class="bc-play">Play both</button>'
        '<input type="range" class="bc-seek" min="0" max="1000" value="0" '
        'aria-label="Position in both videos"></div>'
        "<details><summary>Both in one video, always in step</summary>"
        f'<video src="{files["both"]}" controls muted loop playsinline preload="metadata" '
        f'aria-label="Side by side: {about}"></video></details></figure>'
    )


def _difference(shot: Shot, address: str) -> str:
    frame = f", frame {shot.frame}, where it is largest" if shot.is_video else ""
    bright = f"brightened {shot.gain} times" if shot.gain > 1 else "not brightened"
    words = "no pixel differs" if shot.is_same else bright
    return (
        f'<figure class="bc-difference"><img src="{address}" '
        f'alt="Difference picture, {words}{frame}"><figcaption><b>Difference</b> {words}{frame}'
        "</figcaption></figure>"
    )


def _said(pair: Pair) -> str:
    """In sentences: what was done."""
    asked = pair.settings
    where = f"seed {asked.seed}, {pair.steps} steps, {pair.shot.size[0]} x {pair.shot.size[1]} px"
    lines = [f"“{short(asked.prompt)}”, {where}."]
    if not pair.is_fresh:
        lines.append("The uncached run is kept from before: same settings, same picture.")
    return said(lines)


def said(lines: Iterable[str]) -> str:
    """Small print, a paragraph each."""
    return "".join(f'<p class="bc-said">{escape(line)}</p>' for line in lines)


def alone(address: str, prompt: str, is_video: bool) -> str:
    """A picture or video without an uncached twin."""
    about = escape(short(prompt), quote=True)
    if is_video:
        return (
            f'<video class="bc-alone" src="{address}" controls muted loop playsinline '
            f'aria-label="{about}"></video>'
        )
    return f'<img class="bc-alone" src="{address}" alt="{about}">'


def _speed(times: float) -> str:
    return (
        f"{times:.2f} times as fast."
        if times >= 1
        else f"Slower here: {times:.2f} times the speed."
    )


def likeness(scores: Scores, *, is_video: bool = False) -> str:
    """The decibels in words."""
    what = "video" if is_video else "picture"
    if scores.is_identical:
        return f"The {what}s are identical."
    for least, words in (
        (40, f"The {what}s can hardly be told apart."),
        (32, "Small differences, if one looks for them."),
        (25, "Visible differences."),
    ):
        if scores.psnr_db >= least:
            return words
    return f"It has become another {what}."


def decibels(scores: Scores) -> str:
    """PSNR for people."""
    return "identical" if scores.is_identical else f"{scores.psnr_db:.1f} dB"


def _numbers(pair: Pair) -> str:
    tiles = [
        ("Speed-up", f"{pair.speedup:.2f}x", _seconds(pair.baseline_s, pair.seconds)),
        ("PSNR", decibels(pair.scores), PSNR_WORDS),
        ("SSIM", f"{pair.scores.ssim:.4f}", SSIM_WORDS),
        ("Computed", f"{pair.computed:.0%}", _reuse(pair)),
        ("Density", f"{1 if pair.density is None else pair.density:.0%}", "of attention kept"),
        ("Memory", size(pair.cache_bytes), _memory(pair)),
    ]
    return numbers(tiles)


def numbers(tiles: Iterable[tuple[str, str, str]]) -> str:
    """A line of (name, value, what it is about)."""
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{escape(value)}<small>{escape(about)}</small></dd></div>"
        for name, value, about in tiles
    )
    return f'<dl class="bc-numbers">{cells}</dl>'


def _seconds(before: float, after: float) -> str:
    return f"{before:.2f} s to {after:.2f} s"


def _reuse(pair: Pair) -> str:
    return "of the block calls" if pair.parts is None else f"sub-layers: {pair.parts:.0%} reused"


def _memory(pair: Pair) -> str:
    if pair.peak_gib is None:
        return "held by the cache"
    before, after = pair.peak_gib
    return f"cache; GPU peak {before:.2f} to {after:.2f} GiB"


def _downloads(pair: Pair, link: Link) -> str:
    kinds = (
        {"uncached": "Uncached mp4", "cached": "Cached mp4", "both": "Side-by-side mp4"}
        if pair.shot.is_video
        else {"uncached_as_is": "Uncached PNG", "cached_as_is": "Cached PNG"}
    )
    of_pair = link_within(link, pair)
    links = [_download(of_pair(pair.shot.files[kind]), words) for kind, words in kinds.items()]
    links.append(_plan_download(pair, link))
    copy = '<button type="button" class="bc-button" data-copy>Copy link to these settings</button>'
    return f'<p class="bc-downloads">{"".join(links)}{copy}</p>'


def _plan_download(pair: Pair, link: Link) -> str:
    return _download(link_within(link, pair)(pair.plan_file), "Plan")


def _download(address: str, words: str) -> str:
    return f'<a class="bc-button" href="{address}" download>{escape(words)}</a>'


# ---- why ----------------------------------------------------------------------------------------


def why(pair: Pair | None) -> str:
    """The figures about one run."""
    if pair is None:
        return WHY_WELCOME
    story = pair.story
    maps = "".join(
        (f"<h4>branch {escape(found.title)}</h4>" if len(story.maps) > 1 else "")
        + plots.block_map(found)
        for found in story.maps
    )
    cards = (
        ("What was computed", f"{plots.kind_legend(story.maps)}{maps}", _map_words(pair)),
        ("Change per step", plots.changes(story), _change_words(pair)),
        ("Error per step", plots.errors(story), _ERROR_WORDS),
        (
            "Time by part",
            plots.part_legend(story.parts) + plots.parts(story),
            "Seconds of one call; what watching costs is taken off.",
        ),
    )
    figures = "".join(
        f'<article class="bc-card"><h3>{title}</h3><p>{escape(words)}</p>{body}</article>'
        for title, body, words in cards
    )
    head = f"{pair.name}: {pair.speedup:.2f}x, {decibels(pair.scores)}"
    return (
        f'<p class="bc-verdict"><b>{escape(head)}</b> “{escape(short(pair.settings.prompt))}”</p>'
        f'<div class="bc-cards">{figures}</div>{_step_table(pair)}'
    )


def _map_words(pair: Pair) -> str:
    done = f"{pair.computed:.0%} of the block calls were done"
    parts = "" if pair.parts is None else f", {pair.parts:.0%} of the sub-layer calls reused"
    return f"{done}{parts}."


def _change_words(pair: Pair) -> str:
    if pair.story.threshold is not None:
        return "Below the threshold a step is reused. Faint: the uncached output, step by step."
    if not pair.story.changes:
        return "This plan was fixed beforehand. The line is the uncached output, step by step."
    return (
        "Since the last computed step. Faint: the uncached output, step by step. There is no "
        "threshold: this plan was fixed beforehand."
    )


def _step_table(pair: Pair) -> str:
    """The same numbers for those who cannot hover."""
    story = pair.story
    seen = dict(story.changes)
    rows = "".join(
        f"<tr><th scope=row>{i}</th><td>{share:.0%}</td>"
        f"<td>{_cell(seen.get(i), '.3f')}</td><td>{_nearness(_at(story.errors_db, i))}</td>"
        f"<td>{_cell(_at(story.step_ms[0], i), '.1f')}</td>"
        f"<td>{_cell(_at(story.step_ms[1], i), '.1f')}</td></tr>"
        for i, share in enumerate(story.computed_share)
    )
    heads = ("step", "computed", "change", "nearness, dB", "uncached, ms", "cached, ms")
    columns = "".join(f"<th scope=col>{head}</th>" for head in heads)
    return (
        "<details class=bc-numbers-by-step><summary>All numbers by step</summary>"
        f'<div class="bc-scroll" tabindex="0" role="region" aria-label="Numbers by step"><table>'
        f"<thead><tr>{columns}</tr></thead><tbody>{rows}</tbody></table></div></details>"
    )


def _at(values: Sequence[float], i: int) -> float | None:
    return values[i] if i < len(values) else None


def _nearness(value: float | None) -> str:
    return "same" if value is not None and value >= CAP_DB else _cell(value, ".1f")


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


# ---- explore ------------------------------------------------------------------------------------


def explore(visit: Visit, link: Link) -> str:
    """All runs of a visit: as dots, and as a table."""
    if not visit.pairs:
        return EXPLORE_WELCOME
    current = visit.current
    group = current.settings.uncached if current else ()
    alike = [pair for pair in visit.pairs if pair.settings.uncached == group]
    front = plots.pareto([(pair.seconds, pair.scores.psnr_db) for pair in alike])
    best = {alike[i].id for i in front}
    dots = [
        Dot(
            pair.id,
            pair.seconds,
            pair.scores.psnr_db,
            _tip(pair),
            pair.name,
            is_front=pair.id in best,
            is_other=pair.settings.uncached != group,
            is_current=pair is current,
        )
        for pair in visit.pairs
    ]
    plane = plots.plane(dots, current.baseline_s if current else None)
    words = "Up and to the left is better. The line joins the runs that no other beats in both."
    others = " Faint: other prompts or sizes." if len(alike) < len(visit.pairs) else ""
    return (
        f'<div class="bc-cards"><article class="bc-card"><h3>Time against quality</h3>'
        f"<p>{words}{others}</p>{plane}</article>{_front([alike[i] for i in front], link)}</div>"
        f"{_run_table(visit, best, link)}"
    )


def _front(best: Sequence[Pair], link: Link) -> str:
    """The runs worth choosing from, the fastest first."""
    if not best:
        return ""
    rows = "".join(
        f'<li><img src="{_small_picture(pair, link)}" alt="With {escape(pair.name, quote=True)}">'
        f"<span><b>{escape(pair.name)}</b><small>{pair.speedup:.2f}x, {decibels(pair.scores)}, "
        f"{pair.computed:.0%}&nbsp;computed</small></span>"
        f'<button type="button" class="bc-button" data-run="{pair.id}" '
        f'aria-label="Show {escape(pair.name, quote=True)}">Show</button></li>'
        for pair in best
    )
    prompt = escape(short(best[0].settings.prompt))
    return (
        '<article class="bc-card"><h3>The choice</h3><p>The fastest first, the nearest last, '
        f'for “{prompt}”.</p><ol class="bc-choice">{rows}</ol></article>'
    )


def _small_picture(pair: Pair, link: Link) -> str:
    files = pair.shot.files
    return link_within(link, pair)(files.get("cached_poster") or files["cached_as_is"])


def _tip(pair: Pair) -> str:
    figures = f"{pair.seconds:.2f} s, {pair.speedup:.2f}x, {decibels(pair.scores)}"
    return f"{pair.name}: {figures}, {short(pair.settings.prompt, 60)}"


def _run_table(visit: Visit, best: set[str], link: Link) -> str:
    rows = "".join(_run_row(pair, pair.id in best, link) for pair in reversed(visit.pairs))
    heads = ("plan", "prompt", "steps", "seconds", "speed-up", "PSNR", "SSIM", "computed", "", "")
    columns = "".join(f"<th scope=col>{head}</th>" for head in heads)
    table = visit.write_csv()
    return (
        '<div class="bc-scroll" tabindex="0" role="region" aria-label="Table of all runs">'
        f'<table class="bc-runs"><thead><tr>{columns}</tr></thead><tbody>{rows}</tbody></table>'
        "</div>"
        f'<p class="bc-downloads">{_download(link(table), "Table as CSV")}</p>'
    )


def _run_row(pair: Pair, is_best: bool, link: Link) -> str:
    name = escape(pair.name)
    mark = '<i class="bc-best" title="on the front">front</i>' if is_best else ""
    show = f"Show {name}, {pair.speedup:.2f}x, {decibels(pair.scores)}"
    return (
        f"<tr><th scope=row>{name} {mark}</th>"
        f'<td class="bc-prompt">{escape(short(pair.settings.prompt, 80))}</td>'
        f"<td>{pair.steps}</td><td>{pair.seconds:.2f}</td><td>{pair.speedup:.2f}x</td>"
        f"<td>{decibels(pair.scores)}</td><td>{pair.scores.ssim:.4f}</td>"
        f"<td>{pair.computed:.0%}</td>"
        f'<td><button type="button" class="bc-button" data-run="{pair.id}" '
        f'aria-label="{escape(show, quote=True)}">Show</button></td>'
        f"<td>{_plan_download(pair, link)}</td></tr>"
    )


# ---- tuning -------------------------------------------------------------------------------------


def tuned(found: Tuned | None, file: str, link: Link) -> str:
    """The plan a tuning found, in its own words."""
    if found is None:
        return ""
    reached = found.plan.reached
    speed = f"{reached['speedup']:.2f} times as fast as uncached." if "speedup" in reached else ""
    verdict = (
        "The goal holds." if reached.get("met") else "The goal is not met; this is the nearest."
    )
    note = "".join(f"<li>{escape(line)}</li>" for line in found.plan.note.splitlines())
    return (
        f'<section class="bc-tuned"><p class="bc-verdict"><b>{escape(found.name)}</b> {verdict} '
        f'{speed}</p><ul>{note}</ul><p class="bc-downloads">'
        f"{_download(link(file), 'Plan')}</p></section>"
    )


def small(words: str) -> str:
    """A line of small print."""
    return f'<p class="bc-said">{escape(words)}</p>'


def short(text: str, longest: int = _LONGEST_SHOWN) -> str:
    """One line, cut where it gets long."""
    text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"
