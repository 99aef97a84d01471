"""The pages for browsers, and the files that they are made of."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent / "page_files"
PAGES = {"index.html": "/", "docs.html": "/docs"}
TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
# Browsers ask every time, so that a page is never older than its server.
HEADERS = {"Cache-Control": "no-cache"}


def page_routes() -> list[Route]:
    """A route to each file, which is read now. They hold nothing private, and want no token."""
    return [_route(file) for file in sorted(FOLDER.iterdir()) if file.suffix in TYPES]


def _route(file: Path) -> Route:
    content, kind = file.read_bytes(), TYPES[file.suffix]

    async def sent(request: Request) -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return Route(PAGES.get(file.name, f"/page/{file.name}"), sent)
