"""The Gradio page: what is on it, and what happens when something is pressed.

Everything that computes is in `runs`; everything that is drawn comes from `panels` and `plots`.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Any, overload

from blockcache.demo import browse, panels, shelf
from blockcache.demo.desk import Job
from blockcache.demo.runs import Workshop
from blockcache.demo.settings import from_query
from blockcache.demo.visits import Visit
from blockcache.errors import BlockCacheError
from blockcache.methods.presets import BUDGETS

_POLL_S = 0.15
_WAYS = [
    ("Preset", "preset"),
    ("Quality", "target"),
    ("Recipe", "recipe"),
    ("Plan file", "plan"),
]
_GOALS = {"PSNR, dB": ("psnr", 35.0), "SSIM": ("ssim", 0.97), "Speed-up": ("speedup", 3.0)}
_TARGETS = (20, 50, 35)

# Clicks and key presses on what carries a number become an event of the component.
_PICK = """
const send = (event) => {
  const hit = event.target.closest("[data-%s]");
  if (!hit) return;
  const key = event.type === "keydown";
  if (key && (hit.tagName === "BUTTON" || (event.key !== "Enter" && event.key !== " "))) return;
  event.preventDefault();
  trigger("select", { id: hit.dataset.%s });
};
element.addEventListener("click", send);
element.addEventListener("keydown", send);
"""

_LIVE = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}

Values = Mapping[Any, Any]
Updates = dict[Any, Any]


def _of_visitor(handler: Callable[..., Updates]) -> Callable[..., Updates]:
    """Hand over the visit in place of its token; the browser learns the token of a new one."""

    @wraps(handler)
    def handle(page: "Page", token: object, *more: Any) -> Updates:
        visit = page.shop.visits.open(token)
        return {page.token: visit.token, **handler(page, visit, *more)}

    return handle


class Page:
    """The components of the page and their handlers."""

    def __init__(self, workshop: Workshop, folders: Sequence[Path]) -> None:
        """Build it. folders: to browse; without models there is nothing else."""
        import gradio as gr

        self.gr, self.shop, self.folders = gr, workshop, list(folders)
        with gr.Blocks(title="blockcache", analytics_enabled=False, fill_width=True) as self.blocks:
            self.token = gr.BrowserState("", storage_key="blockcache-visit")
            gr.HTML(panels.header(self._mode()), elem_id="bc-header")
            with gr.Tabs(elem_id="bc-tabs") as self.tabs:
                if workshop.names:
                    with gr.Tab("Compare", id="compare"):
                        self._compare_tab()
                    with gr.Tab("Why", id="why"):
                        self.why = gr.HTML(panels.why(None))
                    with gr.Tab("Explore", id="explore"):
                        self.explore = gr.HTML(js_on_load=_PICK % ("run", "run"))
                    with gr.Tab("Tune", id="tune"):
                        self._tune_tab()
                if self.folders:
                    with gr.Tab("Browse", id="browse"):
                        self._browse_tab()
            if workshop.names:
                self._wire()
            if self.folders:
                self._wire_browsing()

    def _mode(self) -> str:
        if not self.shop.names:
            return "browsing a folder, no model loaded"
        return self.shop.words()

    # ---- what is on it -------------------------------------------------------------------------

    def _compare_tab(self) -> None:
        gr, defaults = self.gr, self.shop.defaults(self.shop.names[0])
        limits = self.shop.limits
        with gr.Row(elem_classes="bc-columns"):
            with gr.Column(scale=4, min_width=280, elem_classes="bc-settings"):
                self.model = gr.Dropdown(
                    list(self.shop.names),
                    value=self.shop.names[0],
                    label="Model",
                    allow_custom_value=self.shop.any_model,
                    visible=len(self.shop.names) > 1 or self.shop.any_model,
                )
                self.prompt = gr.Textbox(
                    next(iter(defaults.prompts), ""),
                    label="Prompt",
                    lines=2,
                    max_lines=6,
                    max_length=limits.prompt,
                )
                if defaults.prompts:
                    short = sorted(defaults.prompts[1:], key=len)[:3]
                    gr.Examples(short, self.prompt, label="Examples")
                self._way_controls()
                with gr.Row():
                    self.seed = gr.Number(0, label="Seed", precision=0, min_width=90)
                    self.steps = gr.Number(defaults.steps, label="Steps", precision=0, min_width=90)
                with gr.Accordion("Size and more", open=False):
                    self._size_controls(defaults)
                with gr.Row(elem_classes="bc-actions"):
                    self.go = gr.Button(
                        "Generate both",
                        variant="primary",
                        elem_id="bc-go",
                        scale=3,
                        interactive=False,
                    )
                    self.stop = gr.Button("Stop", interactive=False, elem_id="bc-stop", scale=1)
            with gr.Column(scale=9, min_width=280, elem_id="bc-stage"):
                self.status = gr.HTML(elem_id="bc-status")
                self.result = gr.HTML(panels.welcome(), elem_id="bc-result")

    def _way_controls(self) -> None:
        gr = self.gr
        self.way = gr.Radio(_WAYS, value="preset", label="Choose the plan by", elem_id="bc-way")
        words = ", ".join(f"{word} {share:.0%}" for word, share in BUDGETS.items())
        self.preset = gr.Radio(
            list(BUDGETS),
            value="balanced",
            label="Preset",
            info=f"Steps computed: {words}.",
        )
        low, high, value = _TARGETS
        self.target = gr.Slider(
            low, high, value, step=1, label="At least this near, PSNR in dB", visible=False
        )
        self.picked = gr.HTML(visible=False, elem_classes="bc-picked")
        self.recipe = gr.Dropdown(
            shelf.usable_recipes(), value="first_block", label="Recipe", visible=False
        )
        self.knobs = gr.Textbox(
            label="Settings of the recipe",
            placeholder="name=value, name=value; empty: its own",
            info=shelf.about("first_block"),
            max_length=200,
            visible=False,
        )
        self.plan = gr.Dropdown([], label="Plan", visible=False, elem_id="bc-plan")
        self.upload = gr.UploadButton(
            "Upload a plan file", file_types=[".json"], visible=False, elem_id="bc-upload"
        )

    def _size_controls(self, defaults: Any) -> None:
        gr = self.gr
        with gr.Row():
            self.width = gr.Number(defaults.width, label="Width, px", precision=0, min_width=90)
            self.height = gr.Number(defaults.height, label="Height, px", precision=0, min_width=90)
        with gr.Row():
            self.frames = gr.Number(
                defaults.frames,
                label="Frames",
                precision=0,
                min_width=90,
                visible=defaults.is_video,
            )
            self.guidance = gr.Number(defaults.guidance, label="Guidance", min_width=90)
        self.fresh = gr.Checkbox(False, label="Measure the uncached run anew")

    def _tune_tab(self) -> None:
        gr, defaults = self.gr, self.shop.defaults(self.shop.names[0])
        limits = self.shop.limits
        with gr.Row(elem_classes="bc-columns"):
            with gr.Column(scale=4, min_width=280, elem_classes="bc-settings"):
                self.prompts = gr.Textbox(
                    "\n".join(defaults.prompts),
                    label="Prompts, one a line",
                    info="A third of them is searched on, the others check.",
                    lines=8,
                    max_lines=16,
                    max_length=64 * limits.prompt,
                )
                self.goal = gr.Radio(list(_GOALS), value="PSNR, dB", label="What you ask for")
                self.wanted = gr.Number(_GOALS["PSNR, dB"][1], label="At least")
                self.effort = gr.Radio(
                    ["quick", "full"],
                    value="quick",
                    label="Search",
                    info="“full” may take three times as many runs.",
                )
                self.minutes = gr.Slider(
                    1,
                    max(1, limits.minutes),
                    min(3, limits.minutes),
                    step=1,
                    label="Minutes at most",
                )
                with gr.Row(elem_classes="bc-actions"):
                    self.tune = gr.Button(
                        "Tune", variant="primary", elem_id="bc-tune", scale=3, interactive=False
                    )
                    self.tune_stop = gr.Button("Stop", interactive=False, scale=1)
            with gr.Column(scale=9, min_width=280):
                self.tune_status = gr.HTML(panels.TUNE_WELCOME)
                self.tuned = gr.HTML()
                self.apply = gr.Button(
                    "Use this plan in Compare", variant="primary", visible=False, elem_id="bc-apply"
                )

    def _browse_tab(self) -> None:
        gr = self.gr
        names = [folder.name for folder in self.folders]
        with gr.Row(elem_classes="bc-browse-bar"):
            self.folder = gr.Dropdown(
                names, value=names[0], type="index", label="Folder", visible=len(names) > 1
            )
            self.order = gr.Radio(list(browse.ORDERS), value=browse.ORDERS[0], label="Order")
            self.page_number = gr.Number(1, label="Page", precision=0, minimum=1, min_width=90)
        self.about = gr.HTML(elem_classes="bc-picked")
        self.opened = gr.HTML(elem_id="bc-opened")
        self.grid = gr.HTML(js_on_load=_PICK % ("item", "item"), elem_id="bc-grid")

    # ---- what happens --------------------------------------------------------------------------

    @property
    def _settings(self) -> dict[str, Any]:
        """The components of the settings by the names that links use."""
        return {
            "model": self.model,
            "prompt": self.prompt,
            "seed": self.seed,
            "steps": self.steps,
            "height": self.height,
            "width": self.width,
            "frames": self.frames,
            "guidance": self.guidance,
            "way": self.way,
            "knobs": self.knobs,
        }

    @property
    def _whats(self) -> dict[str, Any]:
        """The component that says what, by way."""
        return {
            "preset": self.preset,
            "target": self.target,
            "recipe": self.recipe,
            "plan": self.plan,
        }

    @property
    def _shown(self) -> list[Any]:
        """What changes when a job goes on or another pair is shown, and whose it is."""
        panes = [self.status, self.result, self.why, self.explore, self.plan, self.go, self.stop]
        tuning = [self.tune_status, self.tuned, self.apply, self.tune, self.tune_stop]
        # The token first: what a change of another one sets off is already asked with it.
        return [self.token, *panes, *tuning]

    def _wire(self) -> None:
        import gradio as gr

        # Gradio hands these over to what is annotated with its own classes.
        def opened(token: object, request: gr.Request) -> Updates:
            return self._open(token, dict(request.query_params))

        def brought_back(token: object, event: gr.EventData) -> Updates:
            return self._bring_back(token, event)

        asked = {*self._settings.values(), *self._whats.values(), self.token, self.fresh}
        live: dict[str, Any] = {**_LIVE}
        quick = {**live, "queue": False}
        restored = [*self._settings.values(), *self._whats.values(), self.picked, self.upload]
        self.blocks.load(opened, self.token, [*self._shown, *restored], **live).then(
            self._reattach, self.token, self._shown, **live
        )
        gr.on([self.go.click, self.prompt.submit], self._generate, asked, self._shown, **live)
        gr.on([self.stop.click, self.tune_stop.click], self._stop, self.token, self.token, **quick)
        tuning = {*asked, self.prompts, self.goal, self.wanted, self.effort, self.minutes}
        self.tune.click(self._tune, tuning, self._shown, **live)
        self.apply.click(self._apply, self.token, [self.token, *restored, self.tabs], **quick)
        self.explore.select(brought_back, self.token, [*self._shown, *restored, self.tabs], **quick)
        chosen = [self.token, *self._whats.values(), self.knobs, self.upload, self.picked]
        gr.on(
            [self.way.input, self.target.change],
            self._choose_way,
            [self.token, self.way, self.target, self.model],
            chosen,
            **quick,
        )
        self.recipe.input(
            lambda name: gr.update(info=shelf.about(str(name)), value=""),
            self.recipe,
            self.knobs,
            **quick,
        )
        self.upload.upload(
            self._take_plan,
            [self.token, self.upload],
            [self.token, self.plan, self.status],
            **quick,
        )
        self.goal.input(
            lambda goal: _GOALS.get(goal, (None, None))[1], self.goal, self.wanted, **quick
        )
        self.model.input(
            self._choose_model,
            self.model,
            [self.steps, self.height, self.width, self.frames, self.guidance],
            **quick,
        )

    # ---- opening -------------------------------------------------------------------------------

    @_of_visitor
    def _open(self, visit: Visit, query: Mapping[str, str]) -> Updates:
        """A new page: this visitor's things, or what the link asks for."""
        updates = self._panes(visit)
        try:
            asked, plan = from_query(query)
            if plan is not None:
                asked["what"] = visit.keep_plan(shelf.Tuned(asked.get("what", "linked"), plan)).name
        except BlockCacheError as error:
            return {**updates, self.status: panels.alert(str(error))}
        return {**updates, **self._restored(visit, asked)} if asked else updates

    def _restored(self, visit: Visit, asked: Mapping[str, Any]) -> Updates:
        """The settings' components with these values; what is not named stays as it is."""
        gr, updates = self.gr, {}
        for name, component in self._settings.items():
            if name in asked and name != "knobs":
                is_number = isinstance(component, gr.Number)
                value = asked[name]
                updates[component] = _number(value, None) if is_number else value
        way = asked.get("way", "preset")
        if way not in self._whats:
            return updates
        updates |= self._choices(visit, way, asked.get("what"), str(asked.get("model") or ""))
        updates[self.knobs] = gr.update(value=asked.get("knobs", ""), visible=way == "recipe")
        return updates

    def _choices(self, visit: Visit, way: str, what: Any, model: str) -> Updates:
        """The controls of one way, the others hidden."""
        gr = self.gr
        target = _number(what, _TARGETS[2]) if way == "target" else None
        updates = {
            self.preset: gr.update(visible=way == "preset"),
            self.target: gr.update(visible=way == "target"),
            self.recipe: gr.update(visible=way == "recipe"),
            self.knobs: gr.update(visible=way == "recipe"),
            self.plan: self._plan_list(visit, model, None, way == "plan"),
            self.upload: gr.update(visible=way == "plan"),
            self.picked: gr.update(
                value="" if target is None else self._pick_words(visit, model, target),
                visible=way == "target",
            ),
        }
        if way == "preset" and what in BUDGETS:
            updates[self.preset] = gr.update(value=what, visible=True)
        if target is not None:
            updates[self.target] = gr.update(value=target, visible=True)
        if way == "recipe" and what in shelf.usable_recipes():
            updates[self.recipe] = gr.update(value=what, visible=True)
        if way == "plan":
            updates[self.plan] = self._plan_list(visit, model, what, True)
        return updates

    def _plan_list(self, visit: Visit, model: str, value: Any, is_visible: bool | None) -> Any:
        plans = self.shop.plans_for(visit, model or self.shop.names[0])
        choices = [(tuned.words, tuned.name) for tuned in plans]
        names = [name for _, name in choices]
        more: dict[str, Any] = {} if is_visible is None else {"visible": is_visible}
        if value in names or is_visible:
            more["value"] = value if value in names else (names[0] if names else None)
        return self.gr.update(choices=choices, **more)

    def _pick_words(self, visit: Visit, model: str, psnr_db: float) -> str:
        plans = self.shop.plans_for(visit, model or self.shop.names[0])
        try:
            words = f"Takes {shelf.pick(plans, psnr_db, model).words}."
        except BlockCacheError as error:
            words = str(error)
        return panels.small(words)

    async def _reattach(self, token: object) -> AsyncIterator[Updates]:
        """After a reload in mid-run, go on watching."""
        visit = self.shop.visits.open(token)
        yield {self.token: visit.token}
        if visit.is_busy:
            async for updates in self._watch(visit):
                yield updates

    # ---- running -------------------------------------------------------------------------------

    async def _generate(self, values: Values) -> AsyncIterator[Updates]:
        visit = self.shop.visits.open(values[self.token])
        yield {self.token: visit.token}
        try:
            self.shop.compare(visit, self._asked(values), is_fresh=bool(values[self.fresh]))
        except BlockCacheError as error:
            yield {self.status: panels.alert(str(error))}
            return
        async for updates in self._watch(visit):
            yield updates

    async def _tune(self, values: Values) -> AsyncIterator[Updates]:
        visit = self.shop.visits.open(values[self.token])
        yield {self.token: visit.token}
        word, _ = _GOALS.get(values[self.goal], ("psnr", 0.0))
        prompts = [line.strip() for line in str(values[self.prompts] or "").splitlines()]
        try:
            self.shop.tune(
                visit,
                self._asked(values),
                [line for line in prompts if line],
                {word: _number(values[self.wanted], 0.0)},
                _number(values[self.minutes], 0.0),
                str(values[self.effort]),
            )
        except BlockCacheError as error:
            yield {self.tune_status: panels.alert(str(error))}
            return
        async for updates in self._watch(visit):
            yield updates

    def _asked(self, values: Values) -> dict[str, Any]:
        asked = {name: values[component] for name, component in self._settings.items()}
        what = self._whats.get(str(values[self.way]))
        if asked["way"] != "recipe":
            asked["knobs"] = ""
        return {**asked, "what": None if what is None else values[what]}

    async def _watch(self, visit: Visit) -> AsyncIterator[Updates]:
        """What the page shows of a job until it is over."""
        job = visit.job
        if job is None:
            return
        shown = ""
        buttons = self._buttons(is_busy=True)
        while not job.is_over:
            job.look()
            now = panels.status(job, self.shop.desk.before(job))
            if now != shown or buttons:
                yield {self._status_of(job): now, **buttons}
                shown, buttons = now, {}
            await asyncio.sleep(_POLL_S)
        if job.state == "done":
            yield {**self._panes(visit), self._status_of(job): ""}
        else:
            yield {self._status_of(job): panels.status(job, 0), **self._buttons(is_busy=False)}

    def _status_of(self, job: Job) -> Any:
        return self.tune_status if job.kind == "tune" else self.status

    def _buttons(self, *, is_busy: bool) -> Updates:
        gr = self.gr
        return {
            self.go: gr.update(interactive=not is_busy),
            self.tune: gr.update(interactive=not is_busy),
            self.stop: gr.update(interactive=is_busy),
            self.tune_stop: gr.update(interactive=is_busy),
        }

    def _panes(self, visit: Visit) -> Updates:
        """Everything that shows what a visitor has made."""
        gr, link = self.gr, panels.link_to(visit.folder)
        model = visit.current.settings.model if visit.current else ""
        return {
            self.result: panels.result(visit.current, link),
            self.why: panels.why(visit.current),
            self.explore: panels.explore(visit, link),
            self.plan: self._plan_list(visit, model, None, None),
            self.tuned: panels.tuned(visit.last_tuned, visit.tuned_file, link),
            self.apply: gr.update(visible=visit.last_tuned is not None),
            **self._buttons(is_busy=visit.is_busy),
        }

    @_of_visitor
    def _stop(self, visit: Visit) -> Updates:
        if visit.job is not None:
            visit.job.stop()
        return {}

    # ---- choosing ------------------------------------------------------------------------------

    @_of_visitor
    def _bring_back(self, visit: Visit, event: Any) -> Updates:
        """Show another pair, with its settings."""
        try:
            visit.current = visit.pair(str(event.id))
        except BlockCacheError as error:
            return {self.status: panels.alert(str(error))}
        settings = visit.current.settings
        return {
            **self._panes(visit),
            **self._restored(visit, asdict(settings)),
            self.status: "",
            self.tabs: self.gr.update(selected="compare"),
        }

    @_of_visitor
    def _apply(self, visit: Visit) -> Updates:
        """Take the plan that was tuned last."""
        name = visit.last_tuned.name if visit.last_tuned else ""
        return {
            **self._restored(visit, {"way": "plan", "what": name}),
            self.tabs: self.gr.update(selected="compare"),
        }

    @_of_visitor
    def _choose_way(self, visit: Visit, way: str, target: float, model: str) -> Updates:
        return self._choices(visit, way, target if way == "target" else None, model)

    def _choose_model(self, name: str) -> tuple[Any, ...]:
        gr = self.gr
        try:
            new = self.shop.defaults(self.shop.allowed(name))
        except BlockCacheError as error:
            raise gr.Error(str(error)) from None
        frames = gr.update(value=new.frames, visible=new.is_video)
        return new.steps, new.height, new.width, frames, new.guidance

    @_of_visitor
    def _take_plan(self, visit: Visit, path: str | None) -> Updates:
        if not path:
            return {}
        file = Path(path)
        try:
            name = visit.keep_plan(shelf.read_plan(file)).name
        except BlockCacheError as error:
            return {self.status: panels.alert(str(error))}
        finally:
            file.unlink(missing_ok=True)
        return {self.plan: self._plan_list(visit, "", name, True), self.status: ""}

    # ---- browsing ------------------------------------------------------------------------------

    def _wire_browsing(self) -> None:
        import gradio as gr

        def picked(token: object, number: int | None, event: gr.EventData) -> Updates:
            return self._show_item(token, number, event)

        live: dict[str, Any] = {**_LIVE}
        asked = [self.folder, self.order, self.page_number]
        shown = [self.grid, self.about, self.page_number]
        self.blocks.load(self._list, asked, shown, **live)
        gr.on(
            [self.folder.input, self.order.input, self.page_number.change],
            self._list,
            asked,
            shown,
            **live,
        )
        self.grid.select(picked, [self.token, self.folder], [self.opened, self.token], **live)

    def _list(self, number: int | None, order: str, page: float | None) -> Updates:
        gr = self.gr
        try:
            folder = browse.read(self._folder(number))
        except BlockCacheError as error:
            return {self.grid: "", self.about: panels.alert(str(error))}
        items = folder.ordered(order)
        last = browse.pages(items)
        here = min(max(1, int(page or 1)), last)
        where = f" Page {here} of {last}." if last > 1 else ""
        return {
            self.grid: browse.grid(items, here - 1),
            self.about: panels.small(f"{folder.about}.{where} Choose one to see it large."),
            self.page_number: gr.update(value=here, maximum=last, visible=last > 1),
        }

    def _folder(self, number: int | None) -> Path:
        return self.folders[min(max(0, int(number or 0)), len(self.folders) - 1)]

    @_of_visitor
    def _show_item(self, visit: Visit, number: int | None, event: Any) -> Updates:
        try:
            items = browse.numbers(browse.read(self._folder(number)).items)
            item = items.get(int(_number(event.id, -1)))
            if item is None:
                raise BlockCacheError("that picture is not in the folder any more")
            shown = browse.opened(item, visit)
        except BlockCacheError as error:
            shown = panels.alert(str(error))
        return {self.opened: shown}


@overload
def _number(value: Any, otherwise: float) -> float: ...
@overload
def _number(value: Any, otherwise: None) -> float | None: ...
def _number(value: Any, otherwise: float | None) -> float | None:
    """What came in as a number, or `otherwise`."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return otherwise
