//! Every vector operation against the portable one, and the elementary functions against f64.

use super::super::lanes::{Kernel, LANES, Portable, Simd, bf16_bits};
use super::{Rng, isas};

/// Runs all operations on some inputs and returns their results as bits.
struct Everything {
    a: [f32; LANES],
    b: [f32; LANES],
    wide: [f32; 2 * LANES],
    words: [u32; LANES],
    bytes: u32,
}

impl Kernel for Everything {
    type Output = Vec<(&'static str, Vec<f32>)>;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let out = |v: S::F| {
            let mut t = [0.0; LANES];
            s.store(v, &mut t);
            t.to_vec()
        };
        let (a, b) = (s.load(&self.a), s.load(&self.b));
        let w = s.load_i(&self.words);
        let halves: [u16; LANES] = std::array::from_fn(|i| half::f16::from_f32(self.a[i]).to_bits());
        let brains: [u16; 2 * LANES] = std::array::from_fn(|i| half::bf16::from_f32(self.wide[i]).to_bits());
        let small: [u8; LANES] = std::array::from_fn(|i| self.words[i] as u8);
        let mut stored = [0; LANES];
        s.store_bf16(a, &mut stored);
        let (low, high) = s.split_bf16(w);
        let mut square = [w; LANES];
        for (i, row) in square.iter_mut().enumerate() {
            *row = s.load_i(&std::array::from_fn(|j| (16 * i + j) as u32));
        }
        s.transpose(&mut square);
        let mut results = vec![
            ("add", out(s.add(a, b))),
            ("sub", out(s.sub(a, b))),
            ("mul", out(s.mul(a, b))),
            ("div", out(s.div(a, b))),
            ("max", out(s.max(a, b))),
            ("min", out(s.min(a, b))),
            ("abs", out(s.abs(a))),
            ("round", out(s.round(a))),
            ("f16", out(s.load_f16(&halves))),
            ("bf16", out(s.load_bf16(brains.first_chunk().unwrap()))),
            ("u8", out(s.load_u8(&small))),
            ("split low", out(low)),
            ("split high", out(high)),
            ("store bf16", stored.map(f32::from).to_vec()),
            ("pairs", out(s.split_bf16(s.load_pairs(&brains)).1)),
            ("dot_u8", out(s.to_f32(s.dot_u8(s.splat_i(-7), w, self.bytes)))),
            ("low nibbles", out(s.to_f32(s.low_nibbles(w)))),
            ("high nibbles", out(s.to_f32(s.high_nibbles(w)))),
            ("keep", out(s.keep(a, 3, 11, -1.5))),
            ("keep none", out(s.keep(a, 0, 0, -1.5))),
            ("keep all", out(s.keep(a, 0, 16, -1.5))),
            ("pow2", out(s.pow2(s.round(s.mul(a, s.splat(30.0)))))),
            ("sum", vec![s.sum(a)]),
            ("largest", vec![s.largest(a)]),
        ];
        for row in square {
            results.push(("transpose", out(s.to_f32(row))));
        }
        s.prefetch(&self.a, 1 << 20);
        results
    }
}

#[test]
fn vector_operations_equal_the_portable_ones() {
    let seed = 11;
    println!("seed {seed}");
    let mut rng = Rng(seed);
    for round in 0..200 {
        let mut inputs = || Everything {
            a: std::array::from_fn(|_| rng.normal()),
            b: std::array::from_fn(|_| rng.normal()),
            wide: std::array::from_fn(|_| rng.normal()),
            // Exponents that stay finite when a half is read as bfloat16.
            words: std::array::from_fn(|_| rng.next() as u32 & 0x3fff_3fff),
            bytes: rng.next() as u32,
        };
        let Everything { a, b, wide, words, bytes } = inputs();
        let again = || Everything { a, b, wide, words, bytes };
        let want = Portable.run_all(again());
        for isa in isas() {
            let got = isa.run(again());
            for ((name, got), (_, want)) in got.iter().zip(&want) {
                assert_eq!(super::bits(got), super::bits(want), "{name} on {isa:?}, round {round}");
            }
        }
    }
}

impl Portable {
    fn run_all<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }
}

/// exp, tanh, max, largest of one vector.
struct Functions([f32; LANES]);

impl Kernel for Functions {
    type Output = [[f32; LANES]; 3];
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let x = s.load(&self.0);
        let mut out = [[0.0; LANES]; 3];
        s.store(s.exp(x), &mut out[0]);
        s.store(s.tanh(x), &mut out[1]);
        out[2][0] = s.largest(x);
        out
    }
}

#[test]
fn exp_and_tanh_keep_their_bounds() {
    for isa in isas() {
        for step in 0..4_000 {
            let x: [f32; LANES] =
                std::array::from_fn(|i| -87.0 + (step * LANES + i) as f32 * 175.0 / 64_000.0);
            let [exp, tanh, _] = isa.run(Functions(x));
            for i in 0..LANES {
                let (e, t) = (f64::from(x[i]).exp(), f64::from(x[i]).tanh());
                assert!((f64::from(exp[i]) - e).abs() <= 4e-7 * e, "exp({}) = {} on {isa:?}", x[i], exp[i]);
                assert!((f64::from(tanh[i]) - t).abs() <= 5e-7, "tanh({}) = {} on {isa:?}", x[i], tanh[i]);
            }
        }
    }
}

#[test]
fn edges_of_exp() {
    for isa in isas() {
        let mut x = [0.0; LANES];
        x[..6].copy_from_slice(&[f32::NEG_INFINITY, f32::INFINITY, f32::NAN, -1e30, 0.0, -88.5]);
        let [exp, tanh, _] = isa.run(Functions(x));
        assert_eq!(exp[0], 0.0, "{isa:?}");
        assert!(exp[1] > 1e38, "{isa:?}");
        assert!(exp[2].is_nan() && tanh[2].is_nan(), "{isa:?}");
        assert_eq!((exp[3], exp[4], exp[5]), (0.0, 1.0, 0.0), "{isa:?}");
        assert_eq!((tanh[0], tanh[1]), (-1.0, 1.0), "{isa:?}");
    }
}

#[test]
fn nan_is_never_hidden() {
    for isa in isas() {
        for at in 0..LANES {
            let mut x: [f32; LANES] = std::array::from_fn(|i| i as f32);
            x[at] = f32::NAN;
            assert!(isa.run(Functions(x))[2][0].is_nan(), "lane {at} on {isa:?}");
        }
    }
    assert_eq!(bf16_bits(f32::NAN) & 0x7f80, 0x7f80);
    assert_ne!(bf16_bits(f32::from_bits(0x7f80_0001)) & 0x7f, 0, "a NaN stays one when its low half is cut");
    assert_eq!(bf16_bits(f32::INFINITY), 0x7f80);
}
