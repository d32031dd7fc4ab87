//! Memory sizes as people write them: `512M`, `4G`, `1048576K`.

/// Reads a size with a unit. A bare number is refused rather than guessed at: other
/// programs take it for bytes or for mebibytes.
///
/// # Errors
/// A sentence for the user, to follow "invalid value".
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = text.strip_prefix(digits).unwrap_or_default();
    let number: u64 = digits
        .parse()
        .map_err(|_| "a size is a whole number and a unit, such as 512M or 4G".to_string())?;
    let shift = match unit.to_ascii_uppercase().as_str() {
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        "" => return Err(format!("say the unit: {number}M is MiB, {number}G is GiB")),
        other => return Err(format!("\"{other}\" is no unit: use K, M, G or T")),
    };
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "that is more than 64 bits of address space hold".to_string())
}

/// Writes a size with the largest unit that leaves a whole number.
pub(crate) fn display(bytes: u64) -> String {
    for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes >= 1 << shift && bytes.trailing_zeros() >= shift {
            return format!("{} {unit}", bytes >> shift);
        }
    }
    format!("{bytes} bytes")
}

#[cfg(test)]
mod tests {
    use super::{display, parse};

    #[test]
    fn sizes_with_units() {
        assert_eq!(parse("512M"), Ok(512 << 20));
        assert_eq!(parse("4g"), Ok(4 << 30));
        assert_eq!(parse("1048576KiB"), Ok(1 << 30));
        assert_eq!(parse("1T"), Ok(1 << 40));
    }

    #[test]
    fn what_is_no_size_is_refused_with_a_remedy() {
        for text in ["", "M", "-1M", "1.5G", "12Q", "512", "M512", "99999999999999999999M"] {
            assert!(parse(text).is_err(), "{text:?} was taken for a size");
        }
        assert!(parse("512").unwrap_err().contains("512M"));
        assert!(parse("99999999T").unwrap_err().contains("64 bits"));
    }

    #[test]
    fn shown_as_written() {
        assert_eq!(display(512 << 20), "512 MiB");
        assert_eq!(display(4 << 30), "4 GiB");
        assert_eq!(display((4 << 30) + 1024), "4194305 KiB");
        assert_eq!(display(3), "3 bytes");
    }
}
