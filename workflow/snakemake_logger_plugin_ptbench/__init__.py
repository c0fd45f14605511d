"""What a run shows while it runs: a live display on a terminal, a line for each run elsewhere.

With --verbose, --debug-dag, --show-failed-logs and in dry runs it is Snakemake's own output, in dry
runs without its banner. Its full log is in .snakemake/log whatever is shown. `ptbench.report.live`
decides what to say.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from snakemake.logging import ColorizingTextHandler, DefaultFilter, DefaultFormatter
from snakemake_interface_logger_plugins.base import LogHandlerBase

from ptbench.report.dry_run import Brief
from ptbench.report.live import Display

if TYPE_CHECKING:
    from snakemake_interface_logger_plugins.settings import OutputSettingsLoggerInterface


class LogHandler(LogHandlerBase):
    """Hands Snakemake's events to the display, or to Snakemake's own handler."""

    def __post_init__(self) -> None:
        """Choose between the two."""
        settings = self.common_settings
        stream = sys.stdout if settings.stdout else sys.stderr
        quiet = {str(each) for each in settings.quiet or ()}
        if (
            settings.dryrun or settings.verbose or settings.debug_dag or settings.show_failed_logs
        ):  # fmt: skip
            self.handler: logging.Handler = snakemake_s_own(settings)
            if settings.dryrun and not settings.verbose:
                self.handler.addFilter(Brief(counted_once="rules" in quiet))
        else:
            self.handler = Display(stream, quiet, colours=not settings.nocolor)

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record."""
        self.handler.handle(record)

    def close(self) -> None:
        """End the display."""
        self.handler.close()
        super().close()

    @property
    def writes_to_stream(self) -> bool:
        return True

    @property
    def writes_to_file(self) -> bool:
        return False

    @property
    def has_filter(self) -> bool:
        return True

    @property
    def has_formatter(self) -> bool:
        return True

    @property
    def needs_rulegraph(self) -> bool:
        return False


def snakemake_s_own(settings: OutputSettingsLoggerInterface) -> logging.Handler:
    """Return the handler that Snakemake has where there is no plugin."""
    return ColorizingTextHandler(
        nocolor=settings.nocolor,
        stream=sys.stdout if settings.stdout else sys.stderr,
        formatter=DefaultFormatter(settings.quiet, settings.show_failed_logs),
        filter=DefaultFilter(
            settings.quiet,
            settings.debug_dag,
            settings.verbose,
            settings.dryrun,
            settings.printshellcmds,
        ),
    )
