"""Download the tables by which scfm matches names of human genes: HGNC's complete set and GENCODE's genes.

    python scripts/data/download_gene_tables.py gene_tables

writes `hgnc_complete_set.tsv` as HGNC publishes it, and `gencode_genes.tsv` (ensembl_id, symbol, biotype) made from
GENCODE's annotation. A file gets its name only when it is complete; sizes and checksums are compared with what the
servers say, and the number of genes with what such a table holds.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import hashlib
import http.client
import os
import re
import sys
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from email.message import Message
from pathlib import Path

from scfm.data.gene_table import SECOND_COPY, read_rows
from scfm.data.vocabulary import strip_version
from scfm.errors import ScfmError

HGNC = "https://storage.googleapis.com/public-download-files/hgnc/tsv/tsv/hgnc_complete_set.txt"
GENCODE = "https://ftp.ebi.ac.uk/pub/databases/gencode/Gencode_human/release_{release}"
GENCODE_RELEASE = 48
LEAST_HGNC, LEAST_GENCODE = 40_000, 50_000  # genes; either has had more for years
ATTRIBUTE = re.compile(r'(\w+) "([^"]*)"')


def download_hgnc(folder: Path, url: str = HGNC, least: int = LEAST_HGNC) -> Path:
    """Write HGNC's complete set. Raises ScfmError where it cannot be fetched, or holds fewer than `least` genes."""
    return _complete(folder / "hgnc_complete_set.tsv", lambda part: fetch(url, part), url, least)


def download_gencode(folder: Path, url: str, least: int = LEAST_GENCODE) -> Path:
    """Write the genes of a GENCODE annotation.

    Args:
        folder: where to.
        url: gzipped GTF, with GENCODE's MD5SUMS in the same folder.
        least: number of genes below which the annotation is taken for damaged.

    Raises:
        ScfmError: it cannot be fetched, is not the file of MD5SUMS, or holds fewer genes.
    """

    def write(part: Path) -> None:
        annotation, sums = part.with_suffix(".gtf"), part.with_suffix(".md5")
        try:
            place, name = url.rsplit("/", 1)
            fetch(f"{place}/MD5SUMS", sums)
            listed = dict(line.split()[:2][::-1] for line in sums.read_text().splitlines() if len(line.split()) > 1)
            if name not in listed:
                raise ScfmError(f"{place}/MD5SUMS: does not list {name}")
            fetch(url, annotation, md5=listed[name])
            genes = genes_of_gtf(annotation)
            lines = ["ensembl_id\tsymbol\tbiotype", *("\t".join(gene) for gene in genes)]
            part.write_text("\n".join(lines) + "\n", encoding="utf-8")
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise ScfmError(f"{url}: cannot be read as a gzipped GTF ({error})") from error
        finally:
            annotation.unlink(missing_ok=True)
            sums.unlink(missing_ok=True)

    return _complete(folder / "gencode_genes.tsv", write, url, least)


def genes_of_gtf(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield unversioned Ensembl id, symbol and biotype of the genes of a gzipped GTF.

    The second copies of the pseudo-autosomal genes, on chromosome Y, are left out.
    """
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            fields = line.rstrip("\n").split("\t")
            if len(fields) < 9 or fields[2] != "gene":
                continue
            attributes = dict(ATTRIBUTE.findall(fields[8]))
            name = strip_version(attributes.get("gene_id", ""))
            if name and not name.endswith(SECOND_COPY):
                yield name, attributes.get("gene_name", name), attributes.get("gene_type", "")


def fetch(url: str, target: Path, md5: str | None = None) -> None:
    """Write what an address holds.

    Args:
        url: the address.
        target: file to write.
        md5: checksum that it must have; where the server sends one, that is compared in any case.

    Raises:
        ScfmError: the server cannot be reached, or what came is not what was promised.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "scfm", "Accept-Encoding": "identity"})
    digest, size = hashlib.md5(usedforsecurity=False), 0
    try:
        with urllib.request.urlopen(request, timeout=60) as response, target.open("wb") as file:
            while chunk := response.read(2**20):
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
            headers = response.headers
    except (OSError, http.client.HTTPException) as error:
        raise ScfmError(f"{url}: cannot be downloaded ({error})") from error
    promised = headers.get("Content-Length")
    if promised is not None and size != int(promised):
        raise ScfmError(f"{url}: {size:,} of {promised} bytes came; try again")
    for expected in (md5, _sent_md5(headers)):
        if expected is not None and digest.hexdigest() != expected:
            raise ScfmError(f"{url}: the MD5 of what came is {digest.hexdigest()}, not {expected}; try again")


def _sent_md5(headers: Message) -> str | None:
    """Return the checksum that Google's storage sends, where it is that of the bytes that come."""
    if headers.get("x-goog-stored-content-encoding", "identity") != "identity":
        return None
    hashes = ",".join(headers.get_all("x-goog-hash", [])).split(",")
    found = [entry.strip().removeprefix("md5=") for entry in hashes if entry.strip().startswith("md5=")]
    return base64.b64decode(found[0]).hex() if found else None


def _complete(target: Path, write: Callable[[Path], None], url: str, least: int) -> Path:
    """Write under a temporary name, look at what is there, then rename."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.stem}.part{target.suffix}")
    try:
        write(part)
        n = len(read_rows(part))
        if n < least:
            raise ScfmError(f"{url}: holds {n:,} genes, at least {least:,} are expected; the file is not complete")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    print(f"{target}: {n:,} genes, sha256 {hashlib.sha256(target.read_bytes()).hexdigest()}")
    return target


def main() -> int:
    """Download both tables; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write the tables")
    parser.add_argument("--release", type=int, default=GENCODE_RELEASE, help="GENCODE's release (default: %(default)s)")
    parser.add_argument("--hgnc-url", default=HGNC, help="HGNC's complete set, e.g. of its archive, to be repeatable")
    parser.add_argument("--gencode-url", help="GENCODE's annotation, a .gtf.gz with MD5SUMS beside it")
    given = parser.parse_args()
    release = f"{GENCODE}/gencode.v{{release}}.annotation.gtf.gz".format(release=given.release)
    try:
        download_hgnc(given.folder, given.hgnc_url)
        download_gencode(given.folder, given.gencode_url or release)
    except ScfmError as error:
        print(f"download_gene_tables: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
