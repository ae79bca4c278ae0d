"""The HTML report, the checks, and the command line."""

from tl_looped.report.checking import CheckResult as CheckResult
from tl_looped.report.checking import check as check
from tl_looped.report.data import ReportData as ReportData
from tl_looped.report.data import collect as collect
from tl_looped.report.prompts import Prompt as Prompt
from tl_looped.report.prompts import built_in as built_in
from tl_looped.report.sections import report_page as report_page
