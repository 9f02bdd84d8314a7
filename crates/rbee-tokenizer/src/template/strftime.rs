//! `strftime_now`: the date that some templates put into the system prompt.

use std::fmt::Write;

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];
const SECONDS_PER_DAY: i64 = 86_400;

/// Formats seconds since 1970 as C's `strftime` does in the C locale; `None` for a directive it does
/// not know or a year outside 0 to 9999.
pub(super) fn strftime(format: &str, seconds: i64) -> Option<String> {
    let days = seconds.div_euclid(SECONDS_PER_DAY);
    let time = seconds.rem_euclid(SECONDS_PER_DAY);
    let (hour, minute, second) = (time / 3600, time / 60 % 60, time % 60);
    let (year, month, day) = civil(days)?;
    let weekday = (days + 3).rem_euclid(7);
    let twelve = (hour + 11) % 12 + 1;
    let half = if hour < 12 { "AM" } else { "PM" };
    let month_name = MONTHS[month as usize - 1];
    let day_name = DAYS[weekday as usize];

    let mut out = String::new();
    let mut letters = format.chars();
    while let Some(letter) = letters.next() {
        if letter != '%' {
            out.push(letter);
            continue;
        }
        let mut directive = letters.next()?;
        let padded = directive != '-';
        if !padded {
            directive = letters.next()?;
        }
        let number = match directive {
            'd' => Some((day, 2)),
            'm' => Some((month, 2)),
            'Y' => Some((year, 4)),
            'y' => Some((year % 100, 2)),
            'H' => Some((hour, 2)),
            'I' => Some((twelve, 2)),
            'M' => Some((minute, 2)),
            'S' => Some((second, 2)),
            'j' => Some((days - days_before(year, 1, 1) + 1, 3)),
            _ => None,
        };
        // Writing to a string does not fail.
        let _ = match (directive, number) {
            (_, Some((value, width))) if padded => write!(out, "{value:0width$}"),
            (_, Some((value, _))) => write!(out, "{value}"),
            ('e', _) => write!(out, "{day:2}"),
            ('B', _) => write!(out, "{month_name}"),
            ('b' | 'h', _) => write!(out, "{}", &month_name[..3]),
            ('A', _) => write!(out, "{day_name}"),
            ('a', _) => write!(out, "{}", &day_name[..3]),
            ('p', _) => write!(out, "{half}"),
            ('F', _) => write!(out, "{year:04}-{month:02}-{day:02}"),
            ('T', _) => write!(out, "{hour:02}:{minute:02}:{second:02}"),
            ('%', _) => write!(out, "%"),
            _ => return None,
        };
    }
    Some(out)
}

/// Year, month and day of a day since 1970 (Howard Hinnant, "chrono-compatible low-level date
/// algorithms").
fn civil(days: i64) -> Option<(i64, i64, i64)> {
    let shifted = days.checked_add(719_468)?;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (0..10_000).contains(&year).then_some((year, month, day))
}

/// The inverse of [`civil`].
fn days_before(year: i64, month: i64, day: i64) -> i64 {
    let year = year - i64::from(month <= 2);
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let shifted_month = if month > 2 { month - 3 } else { month + 9 };
    let day_of_year = (153 * shifted_month + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "Thursday 01 January 1970 00:00:00 001"),
            (951_782_400, "Tuesday 29 February 2000 00:00:00 060"),
            (1_735_689_599, "Tuesday 31 December 2024 23:59:59 366"),
            (-1, "Wednesday 31 December 1969 23:59:59 365"),
        ] {
            assert_eq!(strftime("%A %d %B %Y %H:%M:%S %j", seconds).as_deref(), Some(text));
        }
        assert_eq!(strftime("%-d %b %y, %I %p %%", 0).as_deref(), Some("1 Jan 70, 12 AM %"));
        assert_eq!(strftime("%Q", 0), None);
        assert_eq!(strftime("%Y", i64::MAX), None);
    }

    #[test]
    fn every_day_of_four_centuries_goes_there_and_back() {
        for day in -60_000..90_000 {
            let (y, m, d) = civil(day).unwrap();
            assert_eq!(days_before(y, m, d), day);
        }
    }
}
