"""Download the anime faces (Kaggle, about 400 MB) and unpack them: python data/download.py"""

import argparse
import errno
import http.client
import os
import re
import shutil
import stat
import struct
import sys
import zipfile
import zlib
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

PAGE = "https://www.kaggle.com/datasets/soumikrakshit/anime-faces"
URL = "https://www.kaggle.com/api/v1/datasets/download/soumikrakshit/anime-faces"
TIMEOUT = 30.0  # seconds, for the connection and for each read, not for the whole download
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
MAX_ENTRIES, MAX_ENTRY, MAX_TOTAL = 200_000, 64 << 20, 8 << 30  # far above the real set
NO_FILE_ON_WINDOWS = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)\.", re.IGNORECASE)
BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, RuntimeError)


class DownloadError(Exception):
    """A failure to be told in one line."""


class WrongContent(DownloadError):
    """What arrived can never become the data set, so it is not worth keeping."""


def download(url: str, part: Path, timeout: float = TIMEOUT) -> None:
    """Stream the URL into `part`, going on where an earlier run stopped."""
    if not url.startswith(("http://", "https://")):
        raise DownloadError(f"not a web address: {url}")
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "anime-faces"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = urlopen(Request(url, headers=headers), timeout=timeout)
    except HTTPError as error:
        if error.code == 416 and have:
            return  # nothing left to send, and unpack() verifies what is here
        raise
    # Should the file have changed meanwhile, the CRCs give the mixture away: no ETag needed.
    resumed = response.status == 206
    if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
        raise WrongContent("the server sent another range than asked for, run it again")
    size = have if resumed else 0
    total = None if response.length is None else size + response.length
    of_total = f"/{total / 1e6:.1f}" if total else ""
    with response, open(part, "ab" if resumed else "wb") as file:
        try:
            while chunk := response.read(1 << 16):
                file.write(chunk)
                size += len(chunk)
                if size > MAX_TOTAL:
                    raise WrongContent("refused: the download is far larger than the data set")
                if sys.stderr.isatty():
                    print(f"{size / 1e6:.1f}{of_total} MB", end="\r", file=sys.stderr)
            if total and size < total:
                raise ConnectionError("connection closed")
        except (OSError, http.client.HTTPException) as error:
            got = f"stopped at {size / 1e6:.1f}{of_total} MB ({error})"
            raise DownloadError(f"{got}, run it again to resume") from error


def check(entries: list[zipfile.ZipInfo]) -> None:
    """Refuse a hostile or absurd zip by what it claims, before anything is written."""
    total = sum(entry.file_size for entry in entries)
    if len(entries) > MAX_ENTRIES or total > MAX_TOTAL:
        raise WrongContent(f"refused: the zip has {len(entries)} entries, {total} bytes unpacked")
    for entry in entries:
        # The original name: zipfile has already cut `filename` at a NUL.
        name = entry.orig_filename.replace("\\", "/")
        outside = name.startswith("/") or ".." in name.split("/") or re.match("[A-Za-z]:", name)
        if outside or "\0" in name or stat.S_ISLNK(entry.external_attr >> 16):
            raise WrongContent(f"refused: unsafe entry in the zip: {name[:80]!r}")
        # Other methods are inflated without a bound: a few bytes could fill the memory.
        usual = entry.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if entry.file_size > MAX_ENTRY or not usual:
            raise WrongContent(f"refused: too large or unusually packed: {name[:80]!r}")


def extract(archive: zipfile.ZipFile, folder: Path) -> int:
    """Write the pictures flat into `folder` and return how many."""
    written: dict[str, tuple[int, int]] = {}
    for index, entry in enumerate(archive.infolist()):
        with archive.open(entry) as source:
            # A bounded read: read() would inflate a lying entry into memory whatever its size.
            data = source.read(entry.file_size + 1)
        if len(data) != entry.file_size:
            raise WrongContent("broken zip: an entry has not the size it claims")
        name = entry.filename.replace("\\", "/").split("/")[-1]
        name = re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)[-100:]
        # Dot files are no pictures: macOS leaves a ._1.png beside each 1.png.
        if name.startswith(".") or not name.lower().endswith(PICTURES):
            continue
        # By what notebooks list, the Kaggle zip has the set twice: in data/ and in data/data/.
        if written.get(name.lower()) == (entry.CRC, entry.file_size):
            continue
        while name.lower() in written or NO_FILE_ON_WINDOWS.match(name):
            name = f"{index}-{name}"
        written[name.lower()] = (entry.CRC, entry.file_size)
        (folder / name).write_bytes(data)
    return len(written)


def unpack(zip_path: Path, out: Path) -> int:
    """Unpack the pictures of a zip into `out`, all or none, and return how many."""
    if not zipfile.is_zipfile(zip_path):
        raise WrongContent("what arrived is not a zip (a web page, an error message?)")
    fresh, aside = Path(f"{out}.unpacking"), Path(f"{out}.before")
    shutil.rmtree(fresh, ignore_errors=True)  # from a killed run
    fresh.mkdir()
    try:
        with zipfile.ZipFile(zip_path) as archive:
            check(archive.infolist())
            count = extract(archive, fresh)
        if not count:
            raise WrongContent("no pictures in the zip")
        # Renames only, so that a .gitkeep in `out` survives whichever of them fails.
        if out.exists():
            os.replace(out, aside)
        os.replace(fresh, out)
        if aside.exists():
            for kept in aside.iterdir():
                os.replace(kept, out / kept.name)
            aside.rmdir()
    except (*BROKEN_ZIP, OSError) as error:
        # EINVAL comes from a damaged offset before the start of the zip, the rest from the disk.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise WrongContent(f"broken zip: {error!r}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return count


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.print_usage = lambda *_: None  # an error is one line
    parser.add_argument("--url", default=URL, help="the zip (default: %(default)s)")
    parser.add_argument("--out", default=Path("data/anime"), type=Path, help="(%(default)s)")
    parser.add_argument("--timeout", default=TIMEOUT, type=float, help="seconds (%(default)s)")
    args = parser.parse_args(argv)
    out = args.out.resolve()  # if it is a link, the folder behind it is filled
    part = Path(f"{out}.zip.part")
    try:
        if out.exists() and any(path.name[0] != "." for path in out.iterdir()):
            count = sum(path.suffix.lower() in PICTURES for path in out.rglob("*"))
            if not count:
                raise DownloadError(f"{args.out} holds other files, name another --out")
            print(f"{count} pictures are already in {args.out}, nothing to do")
            return 0
        out.parent.mkdir(parents=True, exist_ok=True)
        download(args.url, part, args.timeout)
        count = unpack(part, out)
        part.unlink()
        print(f"{count} pictures in {args.out}")
        return 0
    except KeyboardInterrupt:
        print("interrupted, run it again to resume", file=sys.stderr)
        return 130
    except (DownloadError, OSError, http.client.HTTPException, ValueError, OverflowError) as error:
        if isinstance(error, WrongContent):
            part.unlink(missing_ok=True)
        what = " ".join(str(error).split()) or type(error).__name__
        by_hand = f"download the zip from {PAGE} in a browser, unpack it into {args.out}"
        by_hand += ", or try `make demo`, which needs no download"
        print(f"download.py: {what}. By hand: {by_hand}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
