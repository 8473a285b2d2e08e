"""The script that downloads gene tables, against a server of our own."""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib.util
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest

from scfm.data.gene_table import Row, read_rows
from scfm.errors import ScfmError

SCRIPT = Path(__file__).parents[2] / "scripts/data/download_gene_tables.py"
HGNC = b"symbol\tstatus\talias_symbol\tprev_symbol\tensembl_gene_id\nTP53\tApproved\tp53\t\tENSG00000141510\n"
GTF_LINES = [
    ("chr17", "gene", 'gene_id "ENSG00000141510.19"; gene_type "protein_coding"; gene_name "TP53"; level 2;'),
    ("chr17", "transcript", 'gene_id "ENSG00000141510.19"; gene_type "protein_coding"; gene_name "TP53";'),
    ("chrX", "gene", 'gene_id "ENSG00000182378.15"; gene_type "protein_coding"; gene_name "PLCXD1";'),
    ("chrY", "gene", 'gene_id "ENSG00000182378.15_PAR_Y"; gene_type "protein_coding"; gene_name "PLCXD1";'),
    ("chr1", "gene", 'gene_id "ENSG00000310526.1"; gene_type "lncRNA"; gene_name "ENSG00000310526";'),
]
GTF = gzip.compress(
    "".join(
        ["##description: made up\n"]
        + [f"{where}\tHAVANA\t{feature}\t1\t2\t.\t+\t.\t{said}\n" for where, feature, said in GTF_LINES]
    ).encode()
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("download_gene_tables", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Server:
    """What each path holds, and which headers it is sent with."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, dict[str, str]] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path not in outer.files:
                    self.send_error(404)
                    return
                content = outer.files[self.path]
                self.send_response(200)
                for name, value in {"Content-Length": str(len(content)), **outer.headers.get(self.path, {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def hold(self, path: str, content: bytes, **headers: str) -> str:
        self.files[path] = content
        self.headers[path] = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.url + path


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    served = Server()
    thread = threading.Thread(target=served.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield served
    served.http.shutdown()
    served.http.server_close()
    thread.join()


def google_hash(content: bytes) -> str:
    return f"crc32c=AAAAAA==,md5={base64.b64encode(hashlib.md5(content).digest()).decode()}"


def gencode(server: Server, content: bytes = GTF, md5: str | None = None) -> str:
    listed = md5 or hashlib.md5(content).hexdigest()
    server.hold("/r48/MD5SUMS", f"{'0' * 32}  other.gtf.gz\n{listed}  genes.gtf.gz\n".encode())
    return server.hold("/r48/genes.gtf.gz", content)


def test_both_tables_are_downloaded(
    script: ModuleType, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script.download_hgnc, "__defaults__", (script.HGNC, 1))
    monkeypatch.setattr(script.download_gencode, "__defaults__", (1,))
    hgnc = server.hold("/hgnc.txt", HGNC, x_goog_hash=google_hash(HGNC))
    given = [str(SCRIPT), str(tmp_path / "tables"), "--hgnc-url", hgnc, "--gencode-url", gencode(server)]
    monkeypatch.setattr(sys, "argv", given)
    assert script.main() == 0
    assert (tmp_path / "tables/hgnc_complete_set.tsv").read_bytes() == HGNC
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == [
        "gencode_genes.tsv",
        "hgnc_complete_set.tsv",
    ]
    assert read_rows(tmp_path / "tables/gencode_genes.tsv") == [
        Row("ENSG00000141510", "TP53"),
        Row("ENSG00000182378", "PLCXD1"),
        Row("ENSG00000310526", None),
    ]
    # Whoever runs it again gets the newer file in place of the older.
    newer = HGNC.replace(b"p53", b"P53|LFS1")
    server.hold("/hgnc.txt", newer)
    assert script.main() == 0
    assert (tmp_path / "tables/hgnc_complete_set.tsv").read_bytes() == newer


@pytest.mark.parametrize(
    ("content", "headers", "complaint"),
    [
        (HGNC, {"Content_Length": str(len(HGNC) + 9)}, "cannot be downloaded|bytes came"),
        (HGNC, {"x_goog_hash": google_hash(b"something else")}, "the MD5 of what came is"),
        (HGNC + b"\n", {"least": "3"}, "holds 1 genes, at least 3 are expected"),
        (b"<html>not today</html>", {}, "needs a column of Ensembl ids"),
    ],
)
def test_what_is_not_the_promised_table_is_refused(
    script: ModuleType, server: Server, tmp_path: Path, content: bytes, headers: dict[str, str], complaint: str
) -> None:
    kept = tmp_path / "hgnc_complete_set.tsv"
    kept.write_bytes(b"an earlier one")
    least = int(headers.pop("least", 1))
    with pytest.raises(ScfmError, match=complaint):
        script.download_hgnc(tmp_path, server.hold("/hgnc.txt", content, **headers), least=least)
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]
    assert kept.read_bytes() == b"an earlier one"


def test_the_checksum_of_a_stored_archive_says_nothing_of_the_text_that_comes(
    script: ModuleType, server: Server, tmp_path: Path
) -> None:
    url = server.hold(
        "/hgnc.txt", HGNC, x_goog_hash=google_hash(gzip.compress(HGNC)), x_goog_stored_content_encoding="gzip"
    )
    script.download_hgnc(tmp_path, url, least=1)


@pytest.mark.parametrize(
    ("content", "md5", "complaint"),
    [
        (GTF, "f" * 32, "the MD5 of what came is"),
        (GTF[:-20], None, "cannot be read as a gzipped GTF"),
        (b"no gzip", None, "cannot be read as a gzipped GTF"),
        (gzip.compress(b"chr1\tx\ty\n"), None, "holds no Ensembl id"),
    ],
    ids=["another MD5", "cut off", "no gzip", "no genes"],
)
def test_a_damaged_annotation_is_refused(
    script: ModuleType, server: Server, tmp_path: Path, content: bytes, md5: str | None, complaint: str
) -> None:
    with pytest.raises(ScfmError, match=complaint):
        script.download_gencode(tmp_path, gencode(server, content, md5), least=1)
    assert list(tmp_path.iterdir()) == []


def test_an_annotation_without_checksum_is_refused(script: ModuleType, server: Server, tmp_path: Path) -> None:
    server.hold("/r48/MD5SUMS", b"")
    with pytest.raises(ScfmError, match=r"MD5SUMS: does not list genes\.gtf\.gz"):
        script.download_gencode(tmp_path, server.hold("/r48/genes.gtf.gz", GTF), least=1)


def test_a_server_that_is_not_there_is_one_message(
    script: ModuleType, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path), "--hgnc-url", server.url + "/nothing"])
    assert script.main() == 1
    assert "/nothing: cannot be downloaded (HTTP Error 404" in capsys.readouterr().err
