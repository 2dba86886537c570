"""Downloading datasets from where they were published."""

import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import urlsplit

from fishr.data.archives import DamagedArchiveError
from fishr.data.fetch import BytesProgress, fetch_file
from fishr.data.listing import BENCHMARKS
from fishr.data.prepare import FilesProgress, Prepared, alone, build_benchmark, complete_benchmark
from fishr.errors import DataError

HUB_DATASETS: Mapping[str, str] = {"pacs": "flwrlabs/pacs"}
"""Datasets on the Hugging Face hub, which are Parquet files there."""

_TERRA = "https://storage.googleapis.com/public-datasets-lila/caltechcameratraps"
_DOMAIN_NET = "http://csr.bu.edu/ftp/visda/2019/multi-source"

URLS: Mapping[str, tuple[str, ...]] = {
    "terra-incognita": (f"{_TERRA}/eccv_18_annotations.tar.gz", f"{_TERRA}/eccv_18_all_images_sm.tar.gz"),
    "domain-net": (
        # Images that DomainNet has twice and DomainBed once; without the list there are more than the published number.
        "https://raw.githubusercontent.com/facebookresearch/DomainBed/main/domainbed/misc/domain_net_duplicates.txt",
        f"{_DOMAIN_NET}/groundtruth/clipart.zip",
        f"{_DOMAIN_NET}/infograph.zip",
        f"{_DOMAIN_NET}/groundtruth/painting.zip",
        f"{_DOMAIN_NET}/quickdraw.zip",
        f"{_DOMAIN_NET}/real.zip",
        f"{_DOMAIN_NET}/sketch.zip",
    ),
}
"""Archives of the benchmarks that are elsewhere."""


class _RemoteFile(NamedTuple):
    name: str
    url: str
    size: int | None = None
    sha256: str | None = None


def download_benchmark(
    name: str, root: Path, *, on_bytes: BytesProgress | None = None, on_files: FilesProgress | None = None
) -> Prepared:
    """Download one of the benchmarks and build its published layout in the data root.

    Called again after an interruption of whatever kind, it continues. What is downloaded lies in ``.downloads/NAME`` in
    the data root, and is deleted once the benchmark is complete. The hub is the one that ``HF_ENDPOINT`` names.

    Args:
        name: Name of the benchmark.
        root: The data root.
        on_bytes: Is told how much of a file has arrived.
        on_files: Is told how many files are read and how many images written.

    Returns:
        The benchmark; it may have been there before, and complete.

    Raises:
        ConfigError: no such benchmark.
        DataError: a benchmark without a source; a source that cannot be reached or has changed; a folder of the
            benchmark that is there and not complete; no room on the disk.
    """
    if listing := complete_benchmark(name, root):
        return Prepared(listing, was_there=True)
    if name not in {*HUB_DATASETS, *URLS}:
        raise DataError(f"{name} cannot be downloaded: {BENCHMARKS[name].source}")
    with alone(name, root) as downloads:
        if listing := complete_benchmark(name, root):  # built by another process meanwhile
            return Prepared(listing, was_there=True)
        archives = []
        try:
            downloads.mkdir(exist_ok=True)
            for file in _remote_files(name):
                archives.append(downloads / file.name)
                fetch_file(file.url, archives[-1], size=file.size, sha256=file.sha256, on_bytes=on_bytes)
            listing = build_benchmark(name, archives, root, on_files)
        except DamagedArchiveError as error:
            error.archive.unlink()
            raise DataError(f"{error}; it was deleted, call again to download it again") from error
        except OSError as error:
            raise DataError(f"{downloads} cannot be written to ({error.strerror or error}): make room there") from error
        shutil.rmtree(downloads)
        return Prepared(listing, was_there=False)


def _remote_files(name: str) -> list[_RemoteFile]:
    if name in HUB_DATASETS:
        return _hub_files(HUB_DATASETS[name])
    return [_RemoteFile(PurePosixPath(urlsplit(url).path).name, url) for url in URLS[name]]


def _hub_files(repository: str) -> list[_RemoteFile]:
    """The Parquet files of a dataset on the hub, as its client names them; it would not continue a file cut off."""
    from huggingface_hub import HfApi, hf_hub_url

    hub = HfApi()
    try:
        files = hub.dataset_info(repository, files_metadata=True).siblings or []
    except Exception as error:  # those of its HTTP library, which is not the same in all versions
        raise DataError(
            f"{hub.endpoint}/datasets/{repository} cannot be reached ({' '.join(str(error).split())}): check the "
            "connection to the network, then call again"
        ) from error
    found = [
        _RemoteFile(
            file.rfilename.replace("/", "-"),
            hf_hub_url(repository, file.rfilename, repo_type="dataset", endpoint=hub.endpoint),
            file.size,
            None if file.lfs is None else file.lfs.sha256,
        )
        for file in files
        if file.rfilename.endswith(".parquet")
    ]
    if not found:
        raise DataError(f"{hub.endpoint}/datasets/{repository} has no Parquet files: the source has changed, ask there")
    return found
