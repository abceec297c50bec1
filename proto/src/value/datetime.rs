//! Dates and timestamps as EncodeDateOnly and EncodeDateTime of Postgres print them in the styles ISO and XSD.

use super::number::{write_padded, write_two};

const MICROS_PER_DAY: i64 = 86_400_000_000;

/// Appends a date; it looks the same in both styles.
pub(super) fn write_date(out: &mut Vec<u8>, days: i32) {
    if write_infinity(out, days, i32::MIN, i32::MAX) {
        return;
    }
    let bc = write_day(out, days.into());
    write_era(out, bc);
}

/// Appends a timestamp; `separator` stands between day and time, `zone` after the time.
pub(super) fn write_timestamp(out: &mut Vec<u8>, micros: i64, separator: u8, zone: &[u8]) {
    if write_infinity(out, micros, i64::MIN, i64::MAX) {
        return;
    }
    let bc = write_day(out, micros.div_euclid(MICROS_PER_DAY));
    out.push(separator);
    write_time(out, micros.rem_euclid(MICROS_PER_DAY));
    out.extend_from_slice(zone);
    write_era(out, bc);
}

fn write_infinity<T: PartialEq>(out: &mut Vec<u8>, value: T, low: T, high: T) -> bool {
    if value == low {
        out.extend_from_slice(b"-infinity");
    } else if value == high {
        out.extend_from_slice(b"infinity");
    } else {
        return false;
    }
    true
}

/// Appends year-month-day; true when the year is BC, which is said at the very end.
fn write_day(out: &mut Vec<u8>, days: i64) -> bool {
    let (year, month, day) = civil(days);
    let bc = year <= 0;
    // There is no year 0: 1 BC comes before AD 1.
    let year = if bc { 1 - year } else { year };
    write_padded(out, year.unsigned_abs(), 4);
    out.push(b'-');
    write_two(out, month);
    out.push(b'-');
    write_two(out, day);
    bc
}

fn write_era(out: &mut Vec<u8>, bc: bool) {
    if bc {
        out.extend_from_slice(b" BC");
    }
}

fn write_time(out: &mut Vec<u8>, micros: i64) {
    let seconds = micros / 1_000_000;
    write_two(out, (seconds / 3600) as u8);
    out.push(b':');
    write_two(out, (seconds / 60 % 60) as u8);
    out.push(b':');
    write_two(out, (seconds % 60) as u8);
    let fraction = micros % 1_000_000;
    if fraction != 0 {
        out.push(b'.');
        write_padded(out, fraction.unsigned_abs(), 6);
        while out.last() == Some(&b'0') {
            out.pop();
        }
    }
}

/// Year (astronomical: 0 is 1 BC), month and day of a day counted from 2000-01-01 in the proleptic Gregorian calendar.
fn civil(days: i64) -> (i64, u8, u8) {
    // Counted from 0000-03-01, a year ends with its leap day, and the calendar repeats every 400 years (146,097 days).
    let days = days + 730_425;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month as u8, day as u8)
}
