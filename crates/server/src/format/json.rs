//! JSON text written by hand, because one chunk is written for each token.
//!
//! Owns escaping and numbers; it never decides what is written.

/// For each byte: 0 if it stands for itself, `u` if it becomes `\u00XX`, else the letter after the backslash.
const ESCAPE: [u8; 256] = {
    let mut table = [0u8; 256];
    let mut i = 0;
    while i < 0x20 {
        table[i] = b'u';
        i += 1;
    }
    table[0x7f] = b'u';
    table[b'\n' as usize] = b'n';
    table[b'\r' as usize] = b'r';
    table[b'\t' as usize] = b't';
    table[0x08] = b'b';
    table[0x0c] = b'f';
    table[b'"' as usize] = b'"';
    table[b'\\' as usize] = b'\\';
    table
};

/// Appends `text` escaped, without the quotes.
pub(crate) fn escape(out: &mut Vec<u8>, text: &str) {
    let bytes = text.as_bytes();
    let mut clean = 0;
    for (i, &byte) in bytes.iter().enumerate() {
        let class = ESCAPE[usize::from(byte)];
        if class == 0 {
            continue;
        }
        out.extend_from_slice(&bytes[clean..i]);
        clean = i + 1;
        if class == b'u' {
            const HEX: &[u8; 16] = b"0123456789abcdef";
            let hex = [b'\\', b'u', b'0', b'0', HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]];
            out.extend_from_slice(&hex);
        } else {
            out.extend_from_slice(&[b'\\', class]);
        }
    }
    out.extend_from_slice(&bytes[clean..]);
}

/// Appends a quoted string.
pub(crate) fn string(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    escape(out, text);
    out.push(b'"');
}

/// Appends a whole number.
pub(crate) fn int(out: &mut Vec<u8>, value: impl itoa::Integer) {
    out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
}

/// Appends a log-probability. What JSON cannot say (negative infinity of an impossible token, NaN) becomes
/// -9999, OpenAI's own value for it.
pub(crate) fn logprob(out: &mut Vec<u8>, value: f32) {
    let value = if value.is_finite() { value } else { -9999.0 };
    out.extend_from_slice(zmij::Buffer::new().format(value).as_bytes());
}

/// Appends `[1,2,3]`.
pub(crate) fn ints(out: &mut Vec<u8>, values: &[u32]) {
    out.push(b'[');
    for (i, &value) in values.iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        int(out, value);
    }
    out.push(b']');
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_character_survives() {
        let mut text: String = (0u32..0x250).filter_map(char::from_u32).collect();
        text.push_str("\u{2028}\u{2029}\u{fffd}😀\u{202e}");
        let mut out = Vec::new();
        string(&mut out, &text);
        assert_eq!(serde_json::from_slice::<String>(&out).unwrap(), text);
        assert!(out.iter().all(|b| *b >= 0x20 && *b != 0x7f), "control characters are escaped");
    }

    #[test]
    fn numbers() {
        let mut out = Vec::new();
        ints(&mut out, &[0, 7, u32::MAX]);
        out.push(b' ');
        for value in [-0.5, 0.0, f32::NEG_INFINITY, f32::NAN, -1e-7] {
            logprob(&mut out, value);
            out.push(b' ');
        }
        let text = String::from_utf8(out).unwrap();
        assert!(text.starts_with("[0,7,4294967295] -0.5 0.0 -9999.0 -9999.0 -1e-7"), "{text}");
        assert_eq!(
            {
                let mut o = Vec::new();
                ints(&mut o, &[]);
                o
            },
            b"[]"
        );
    }
}
