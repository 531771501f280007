//! Mixtures of experts: the choice for each token, and the experts' sum.
//!
//! Owns the order in which rows go to experts and come back. A row's result does not depend on the others: each product
//! has its own bits whatever stands beside it, and a token's experts are added up in the order of its choice.

use mirai_model::backend::{Experts, Result, RouteSpec, Rows};

use super::{CpuBackend, expect_width, gated, unary};
use crate::buffer::{Choice, CpuBuffer, CpuRouting, CpuVector};
use crate::linear::device;
use crate::routing::choose;
use crate::rows::for_each_row;
use crate::simd::Place;
use crate::simd::ops;
use crate::stack::{CpuStack, Pick};

/// Tokens that are worked on together: it bounds the memory, and is enough for large tiles.
const BLOCK: usize = 512;

/// Buffers of this part of a step.
#[derive(Default)]
pub(super) struct Scratch {
    /// Of each choice of a block its place in the order of experts.
    place: Vec<usize>,
    /// First place of each expert, and one past the last.
    first: Vec<usize>,
    /// Of each place its expert.
    expert: Vec<u32>,
    places: Vec<Place>,
    wide: Vec<f32>,
    inner: Vec<f32>,
    out: Vec<f32>,
}

impl Scratch {
    /// Sorts choices by expert, keeping the order of tokens.
    fn sort(&mut self, choices: &[Choice], experts: usize) {
        self.first.clear();
        self.first.resize(experts + 1, 0);
        for choice in choices {
            self.first[choice.expert as usize + 1] += 1;
        }
        for expert in 0..experts {
            self.first[expert + 1] += self.first[expert];
        }
        let mut next = self.first.clone();
        self.place.clear();
        self.expert.clear();
        self.expert.resize(choices.len(), 0);
        for choice in choices {
            let place = &mut next[choice.expert as usize];
            self.expert[*place] = choice.expert;
            self.place.push(*place);
            *place += 1;
        }
    }

    /// Rows of each chosen expert.
    fn picks(&self) -> Vec<Pick<'_>> {
        let ranges = self.first.windows(2).enumerate().filter(|(_, range)| range[0] < range[1]);
        ranges.map(|(index, range)| Pick { index, rows: &self.places[range[0]..range[1]] }).collect()
    }
}

fn grow(data: &mut Vec<f32>, len: usize) {
    if data.len() < len {
        data.resize(len, 0.0);
    }
}

impl CpuBackend {
    pub(super) fn choose_experts(
        &mut self,
        spec: &RouteSpec,
        correction: Option<&CpuVector>,
        expert_scale: Option<&CpuVector>,
        logits: &CpuBuffer,
        routing: &mut CpuRouting,
    ) -> Result<()> {
        const NAME: &str = "route";
        let (tokens, width) = (self.live(Rows::Tokens), spec.experts);
        expect_width(NAME, logits.width(), width)?;
        for vector in [correction, expert_scale].into_iter().flatten() {
            expect_width(NAME, vector.values().len(), width)?;
        }
        let groups_fit = spec.groups.is_none_or(|g| {
            g.count > 0 && width.is_multiple_of(g.count) && g.chosen * (width / g.count) >= spec.top_k
        });
        if spec.top_k == 0 || spec.top_k > width || spec.top_k != routing.top_k || !groups_fit {
            return Err(device(NAME, format!("{spec:?} into room for {} experts a token", routing.top_k)));
        }
        let logits = logits.read(NAME, tokens)?;
        routing.choices.resize(tokens * spec.top_k, Choice::default());
        let [correction, expert_scale] = [correction, expert_scale].map(|v| v.map(CpuVector::values));
        let one = |token: usize, out: &mut [Choice]| {
            choose(spec, correction, expert_scale, &logits[token * width..(token + 1) * width], out);
        };
        for_each_row(&self.pool, &mut routing.choices, spec.top_k, &one);
        Ok(())
    }

    pub(super) fn run_experts(
        &mut self,
        experts: &Experts<'_, CpuStack, CpuVector>,
        routing: &CpuRouting,
        x: &CpuBuffer,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        const NAME: &str = "experts";
        let (tokens, hidden) = (self.live(Rows::Tokens), x.width());
        let (up, down, inner) = (experts.gate_up, experts.down, experts.intermediate);
        expect_width(NAME, up.columns(), hidden)?;
        expect_width(NAME, down.columns(), inner)?;
        if !(up.rows() == inner || up.rows() == 2 * inner) || up.len() != down.len() {
            let message =
                format!("{} of {} x {}, then {} of {inner}", up.len(), up.rows(), hidden, down.len());
            return Err(device(NAME, message));
        }
        for (bias, rows) in [(experts.gate_up_bias, up.rows()), (experts.down_bias, down.rows())] {
            if let Some(bias) = bias {
                expect_width(NAME, bias.values().len(), up.len() * rows)?;
            }
        }
        let choices = routing.choices(tokens).ok_or_else(|| device(NAME, "nothing was routed".to_owned()))?;
        if let Some(choice) = choices.iter().find(|choice| choice.expert as usize >= up.len()) {
            return Err(device(NAME, format!("expert {} of {}", choice.expert, up.len())));
        }
        let width = down.rows();
        let x = x.read(NAME, tokens)?;
        let out = out.write(NAME, tokens, width)?;
        let mut scratch = std::mem::take(&mut self.experts);
        let blocks = choices.chunks(BLOCK * routing.top_k);
        let done = blocks.zip(x.chunks(BLOCK * hidden)).zip(out.chunks_mut(BLOCK * width)).try_for_each(
            |((choices, x), out)| {
                self.block_of_experts(experts, (choices, routing.top_k), x, out, &mut scratch)
            },
        );
        self.experts = scratch;
        done
    }

    /// Experts of some tokens.
    fn block_of_experts(
        &mut self,
        experts: &Experts<'_, CpuStack, CpuVector>,
        (choices, top_k): (&[Choice], usize),
        x: &[f32],
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let (up, down, inner) = (experts.gate_up, experts.down, experts.intermediate);
        let count = choices.len();
        scratch.sort(choices, up.len());
        scratch.places.clear();
        scratch.places.resize(count, Place { x: 0, out: 0 });
        for (choice, &place) in scratch.place.iter().enumerate() {
            scratch.places[place] = Place { x: choice / top_k * up.columns(), out: place * up.rows() };
        }
        let mut wide = std::mem::take(&mut scratch.wide);
        grow(&mut wide, count * up.rows());
        let wide_rows = &mut wide[..count * up.rows()];
        up.multiply(&self.pool, &scratch.picks(), x, wide_rows, &mut self.linear)?;
        self.add_biases(experts.gate_up_bias, &scratch.expert, wide_rows, up.rows());
        grow(&mut scratch.inner, count * inner);
        let inner_rows = &mut scratch.inner[..count * inner];
        if up.rows() == inner {
            let activation = unary("experts", experts.activation)?;
            ops::activate(&self.pool, self.isa, activation, wide_rows, inner, inner_rows);
        } else {
            let glu = gated("experts", experts.activation)?;
            ops::glu(&self.pool, self.isa, glu, wide_rows, inner, inner_rows);
        }
        scratch.wide = wide;

        for (place, to) in scratch.places.iter_mut().enumerate() {
            *to = Place { x: place * inner, out: place * down.rows() };
        }
        let mut made = std::mem::take(&mut scratch.out);
        grow(&mut made, count * down.rows());
        let rows = &mut made[..count * down.rows()];
        let inner_rows = &scratch.inner[..count * inner];
        down.multiply(&self.pool, &scratch.picks(), inner_rows, rows, &mut self.linear)?;
        self.add_biases(experts.down_bias, &scratch.expert, rows, down.rows());
        let (width, isa) = (down.rows(), self.isa);
        let place = &scratch.place;
        for_each_row(&self.pool, out, width, &|token, to| {
            to.fill(0.0);
            for index in token * top_k..(token + 1) * top_k {
                let from = &rows[place[index] * width..(place[index] + 1) * width];
                ops::add_to(isa, to, from, choices[index].weight);
            }
        });
        scratch.out = made;
        Ok(())
    }

    /// Adds to each row the bias of its expert.
    fn add_biases(&self, bias: Option<&CpuVector>, experts: &[u32], rows: &mut [f32], width: usize) {
        let Some(bias) = bias else { return };
        for_each_row(&self.pool, rows, width, &|place, row| {
            let at = experts[place] as usize * width;
            ops::add_to(self.isa, row, &bias.values()[at..at + width], 1.0);
        });
    }
}
