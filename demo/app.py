"""The command `blockcache demo`: loads the model, builds the page, serves it.

What is served is one folder, under names nobody can guess; everything else is refused. The page
loads nothing from anywhere else, and the browser is told to see to that.
"""

import os
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blockcache.errors import BlockCacheError
from blockcache.pipelines.options import debug_option

if TYPE_CHECKING:
    from blockcache.demo.runs import Workshop

_HERE = Path(__file__).parent
_UPLOADS = "uploads"
_MOST_UPLOAD = "4mb"
_CACHE_S = 3600
# Gradio needs inline scripts and builds functions from its templates; hosts it needs none.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "font-src 'self' data:; connect-src 'self' ws: wss:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'"
)
_HEADERS = {
    b"content-security-policy": _POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
}

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@click.command("demo")
@click.option(
    "--model",
    "names",
    multiple=True,
    help="Embedded name, folder or hub id; may be repeated: visitors choose among these. "
    "tiny-image if nothing is said.",
)
@click.option("--allow-any-model", is_flag=True, help="Visitors may name other models, too.")
@click.option(
    "--browse",
    type=click.Path(path_type=Path),
    help="A folder made by `compare` or `generate`; alone, no model is loaded.",
)
@click.option("--plans", type=click.Path(path_type=Path), help="A folder of plan files to offer.")
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0: other machines too.")
@click.option("--port", type=click.IntRange(1, 65535), help="The first free one from 7860 on.")
@click.option("--share", is_flag=True, help="Also at a public address of gradio.live.")
@click.option("--max-steps", type=click.IntRange(1), default=200, show_default=True)
@click.option(
    "--max-side", type=click.IntRange(16), default=1024, show_default=True, help="In pixels."
)
@click.option(
    "--minutes",
    type=click.FloatRange(0.1),
    default=10.0,
    show_default=True,
    help="That one run or tuning may take.",
)
@click.option("--device", help="For example cuda; the first GPU if there is one, else cpu.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of weights.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; 1 for embedded models.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("outputs/demo"),
    show_default=True,
    help="Pictures are kept here while it runs.",
)
@debug_option
def command(
    names: tuple[str, ...],
    allow_any_model: bool,
    browse: Path | None,
    plans: Path | None,
    host: str,
    port: int | None,
    share: bool,
    max_steps: int,
    max_side: int,
    minutes: float,
    device: str | None,
    dtype: str | None,
    threads: int | None,
    out: Path,
) -> None:
    """Open a page that shows speed and quality side by side."""
    _require_gradio()
    from blockcache.demo.browse import folders_in
    from blockcache.demo.runs import Workshop
    from blockcache.demo.settings import Limits
    from blockcache.demo.shelf import plans_in
    from blockcache.pipelines.compare import check_folder

    check_folder(out)
    folders = folders_in(browse) if browse else []
    chosen = names or (() if folders else ("tiny-image",))
    shop = Workshop(
        chosen,
        out / "visits",
        limits=Limits(steps=max_steps, side=max_side, minutes=minutes),
        plans=plans_in(plans) if plans else (),
        any_model=allow_any_model,
        device=device,
        dtype=dtype,
        threads=threads,
    )
    try:
        if chosen:
            click.echo(f"loading {chosen[0]} ...", err=True)
            shop.studio(chosen[0])
        page, address = serve(shop, folders, out, host=host, port=port, share=share)
        click.echo(f"open {address}   (Ctrl-C ends it)")
        page.block_thread()
    finally:
        shop.close()


def serve(
    shop: "Workshop",
    folders: Sequence[Path],
    out: Path,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
) -> tuple[Any, str]:
    """Start the server in threads of its own; returns the page, to be closed, and its address.

    Raises:
        BlockCacheError: gradio is missing, or the port is taken.
    """
    _require_gradio()
    # Read by Gradio when components are made: what visitors upload lies with the rest.
    os.environ["GRADIO_TEMP_DIR"] = str((out / _UPLOADS).absolute())
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # After so many calls it counts them, all anew, for a page of statistics that we do not serve.
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(2**31)
    from starlette.middleware import Middleware

    from blockcache.demo.theme import theme
    from blockcache.demo.ui import Page

    page = Page(shop, folders).blocks
    page.queue(default_concurrency_limit=None, max_size=256)
    try:
        _, local, public = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            allowed_paths=[str(out / "visits")],
            max_file_size=_MOST_UPLOAD,
            theme=theme(),
            css=(_HERE / "page.css").read_text(encoding="utf-8"),
            head=f"<script>{(_HERE / 'page.js').read_text(encoding='utf-8')}</script>",
            footer_links=[],
            ssr_mode=False,
            enable_monitoring=False,
            mcp_server=False,
            pwa=False,
            app_kwargs={"middleware": [Middleware(Guard)]},
        )
    except OSError as error:
        raise BlockCacheError(f"cannot serve on {host}:{port or '7860...'}: {error}") from None
    return page, public or local


def _require_gradio() -> None:
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise BlockCacheError("the demo needs gradio: pip install 'blockcache[demo]'") from None


class Guard:
    """Sets the headers, and keeps Gradio from fetching addresses for visitors."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        """Stand in front of `app`."""
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if _is_proxying(str(scope.get("path", ""))):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"not served here"})
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                known = {name.lower() for name, _ in message["headers"]}
                more = [(k, v) for k, v in _HEADERS.items() if k not in known]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        await self._app(scope, receive, with_headers)


def _is_proxying(path: str) -> bool:
    """Whether the file route is asked for an address in place of a file."""
    _, is_file, wanted = path.partition("file=")
    return "/proxy=" in path or (bool(is_file) and "://" in wanted.replace(":/", "://", 1)[:40])
