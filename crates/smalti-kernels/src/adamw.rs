//! One step of AdamW (arXiv 1711.05101) and of a moving average of the weights.

use crate::cpu::adamw::update;
use crate::flex::serves;
use burn::backend::Flex;
use burn::backend::tensor::FloatTensor;
use burn::tensor::Tensor;

/// Settings of one step for one parameter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Factor of the gradient, such as that of clipping.
    pub gradient_factor: f64,
    /// Learning rate of this step.
    pub rate: f64,
    /// Decay rates of the two moments.
    pub betas: (f64, f64),
    /// `1 - beta^t` of the two moments, `t` counted from 1.
    pub corrections: (f64, f64),
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Share of the old average of the weights, if there is one.
    pub average_decay: Option<f64>,
}

/// A parameter and what an optimiser keeps of it.
#[derive(Debug, Clone)]
pub struct AdamWState {
    /// The parameter.
    pub value: Tensor<1>,
    /// Moving average of the gradients.
    pub first: Tensor<1>,
    /// Moving average of their squares.
    pub second: Tensor<1>,
    /// Moving average of the parameter.
    pub average: Option<Tensor<1>>,
}

impl AdamW {
    /// One step, with the arithmetic of PyTorch's `AdamW`. On the CPU in one pass, and in place for tensors that nothing
    /// else holds.
    ///
    /// # Shapes
    /// `gradient [n]`, and all of the state `[n]`; plain tensors, not recorded for gradients.
    pub fn step(&self, state: AdamWState, gradient: Tensor<1>) -> AdamWState {
        let AdamWState { value, first, second, average } = &state;
        let n = gradient.dims();
        let plain = |t: &Tensor<1>| t.dims() == n && serves(t) && !t.is_autodiff();
        if [value, first, second, &gradient].into_iter().chain(average).all(plain) {
            self.step_on_cpu(state, gradient)
        } else {
            self.portable(state, gradient)
        }
    }

    /// [`AdamW::step`] as a composition of tensor operations.
    pub fn portable(&self, state: AdamWState, gradient: Tensor<1>) -> AdamWState {
        let AdamWState { value, first, second, average } = state;
        let gradient = gradient * self.gradient_factor;
        let first = first * self.betas.0 + gradient.clone() * (1.0 - self.betas.0);
        let second = second * self.betas.1 + gradient.square() * (1.0 - self.betas.1);
        let denominator = second.clone().sqrt() / self.corrections.1.sqrt() + self.epsilon;
        let change = first.clone() / denominator * (self.rate / self.corrections.0);
        let value = value * (1.0 - self.rate * self.weight_decay) - change;
        let average = average.map(|average| match self.average_decay {
            Some(decay) => average * decay + value.clone() * (1.0 - decay),
            None => average,
        });
        AdamWState { value, first, second, average }
    }

    fn step_on_cpu(&self, state: AdamWState, gradient: Tensor<1>) -> AdamWState {
        let [mut value, mut first, mut second] = [state.value, state.first, state.second].map(owned);
        let mut average = state.average.map(owned);
        let gradient = owned(gradient);
        update(
            self,
            value.storage_mut(),
            gradient.storage(),
            first.storage_mut(),
            second.storage_mut(),
            average.as_mut().map_or(&mut [][..], |average| average.storage_mut()),
        );
        AdamWState { value: shown(value), first: shown(first), second: shown(second), average: average.map(shown) }
    }
}

/// A tensor whose memory holds its values in order and nothing else.
fn owned(tensor: Tensor<1>) -> FloatTensor<Flex> {
    let n = tensor.dims()[0];
    let tensor = tensor.try_into_primitive::<Flex>().expect("a plain tensor of the CPU, as `step` checked");
    let whole = tensor.layout().contiguous_offsets() == Some((0, n)) && tensor.storage::<f32>().len() == n;
    if whole { tensor } else { FloatTensor::<Flex>::from_data(tensor.into_data()) }
}

fn shown(tensor: FloatTensor<Flex>) -> Tensor<1> {
    Tensor::from_primitive::<Flex>(tensor)
}
