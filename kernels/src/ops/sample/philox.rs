//! Counter-based random numbers: a draw depends on its key alone, never on draws before it.

const MULTIPLIERS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
const KEY_STEPS: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];

/// Philox4x32-10 (Salmon et al. 2011).
pub const fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    let mut round = 0;
    while round < 10 {
        let first = MULTIPLIERS[0] as u64 * counter[0] as u64;
        let second = MULTIPLIERS[1] as u64 * counter[2] as u64;
        counter = [
            (second >> 32) as u32 ^ counter[1] ^ key[0],
            second as u32,
            (first >> 32) as u32 ^ counter[3] ^ key[1],
            first as u32,
        ];
        key = [key[0].wrapping_add(KEY_STEPS[0]), key[1].wrapping_add(KEY_STEPS[1])];
        round += 1;
    }
    counter
}

/// The draw for the token at `position`, in (0, 1): the upper 52 of the first 64 bits and a half, exact in f64. Key is the
/// seed, low word first; counter is (position, choice_index, 0, 0).
pub const fn uniform(seed: u64, choice_index: u32, position: u32) -> f64 {
    let [low, high, _, _] = philox4x32([position, choice_index, 0, 0], [seed as u32, (seed >> 32) as u32]);
    let bits = ((high as u64) << 32 | low as u64) >> 12;
    (bits as f64 + 0.5) / (1_u64 << 52) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers() {
        // From the authors' Random123 distribution, kat_vectors.
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox4x32([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn draws_are_inside_the_open_interval_and_spread() {
        let draws: Vec<f64> = (0..10_000).map(|position| uniform(7, 0, position)).collect();
        assert!(draws.iter().all(|&u| 0.0 < u && u < 1.0));
        let mean = draws.iter().sum::<f64>() / 1e4;
        assert!((mean - 0.5).abs() < 0.01, "{mean}");
        assert_ne!(uniform(7, 1, 0), uniform(7, 0, 0));
        assert_ne!(uniform(7 + (1 << 32), 0, 0), uniform(7, 0, 0));
    }
}
