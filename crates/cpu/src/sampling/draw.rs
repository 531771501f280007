//! The draw itself: inversion of the cumulative distribution, in the order of ids.
//!
//! Owns one number in, one token out. One uniform number a draw means that the stream of a sequence is a function
//! of its seed, choice and position alone.

use super::weights;

/// Tokens summed as one before the search looks inside.
const BLOCK: usize = 512;

/// The token at which the running sum of the weights first exceeds `u` times the total, for `u` in `[0, 1)`.
/// Tokens of weight 0 are never drawn; `None` if there is no other.
pub(crate) fn draw(row: &[f32], u: f64, sums: &mut Vec<f64>) -> Option<u32> {
    sums.clear();
    sums.extend(row.chunks(BLOCK).map(weights::sum));
    let total: f64 = sums.iter().sum();
    let mut left = u * total;
    let mut last = None;
    // Rounding may leave a crumb after the last block: that block's last possible token is drawn then.
    for (index, sum) in sums.iter().enumerate() {
        if *sum == 0.0 {
            continue;
        }
        last = Some(index);
        if left < *sum {
            break;
        }
        left -= sum;
    }
    let index = last?;
    let start = index * BLOCK;
    let block = &row[start..row.len().min(start + BLOCK)];
    let mut chosen = None;
    let mut seen = 0.0;
    for (offset, w) in block.iter().enumerate() {
        if *w > 0.0 {
            chosen = Some(offset);
            seen += f64::from(*w);
            if seen > left {
                break;
            }
        }
    }
    chosen.map(|offset| (start + offset) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::Lcg;

    fn oracle(row: &[f32], u: f64) -> Option<u32> {
        let total: f64 = row.iter().map(|w| f64::from(*w)).sum();
        let mut seen = 0.0;
        let mut last = None;
        for (id, w) in row.iter().enumerate() {
            if *w > 0.0 {
                last = Some(id as u32);
                seen += f64::from(*w);
                if seen > u * total {
                    break;
                }
            }
        }
        last
    }

    #[test]
    fn agrees_with_a_plain_loop() {
        let mut differ = 0;
        for seed in 0..2000u64 {
            let mut rng = Lcg::new(seed);
            let len = 1 + rng.below(3000);
            let row: Vec<f32> =
                (0..len).map(|_| if rng.below(3) == 0 { 0.0 } else { rng.unit() as f32 }).collect();
            let u = rng.unit();
            let got = draw(&row, u, &mut Vec::new());
            if got != oracle(&row, u) {
                differ += 1;
            }
            if let Some(id) = got {
                assert!(row[id as usize] > 0.0, "seed {seed}: drew an impossible token");
            }
        }
        // Sums in another order round differently in the fifteenth digit; a border is hit about never.
        assert!(differ <= 1, "{differ} of 2000 draws differ");
    }

    #[test]
    fn borders() {
        let row = [0.0, 1.0, 0.0, 1.0, 0.0];
        assert_eq!(draw(&row, 0.0, &mut Vec::new()), Some(1));
        assert_eq!(draw(&row, 0.499, &mut Vec::new()), Some(1));
        assert_eq!(draw(&row, 0.5, &mut Vec::new()), Some(3));
        assert_eq!(draw(&row, 1.0 - f64::EPSILON / 2.0, &mut Vec::new()), Some(3));
        assert_eq!(draw(&[0.0; 600], 0.3, &mut Vec::new()), None);
        assert_eq!(draw(&[], 0.3, &mut Vec::new()), None);
        // The largest number below 1 never runs off the end, whatever the sums round to.
        for seed in 0..200u64 {
            let mut rng = Lcg::new(seed);
            let mut row: Vec<f32> = (0..1500).map(|_| rng.unit() as f32).collect();
            row.extend([0.0; 600]);
            let id = draw(&row, 1.0 - f64::EPSILON / 2.0, &mut Vec::new());
            assert!(id.is_some_and(|id| id < 1500), "seed {seed}: {id:?}");
        }
    }
}
