#include "reference.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace {

double dot(const float* a, const float* b, int n) {
  double sum = 0;
  for (int i = 0; i < n; i++) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

std::vector<double> softmax(std::vector<double> logits) {
  const double most = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (double& l : logits) sum += l = std::exp(l - most);
  for (double& l : logits) l /= sum;
  return logits;
}

bool isTopK(const std::vector<double>& probs, const int64_t* selected, int topK) {
  std::vector<bool> taken(probs.size());
  double least = 1, best = 0;
  for (int k = 0; k < topK; k++) {
    if (selected[k] < 0 || selected[k] >= static_cast<int64_t>(probs.size()) || taken[selected[k]]) return false;
    taken[selected[k]] = true;
    least = std::min(least, probs[selected[k]]);
  }
  for (size_t e = 0; e < probs.size(); e++) best = taken[e] ? best : std::max(best, probs[e]);
  return least >= best - 1e-5;
}

// One token at one of its experts: adds to the token's sum and to all gradients but the router's.  Returns the gradient
// of the probability.
double visitExpert(const Problem& p, int token, int64_t expert, double prob, Answer* a) {
  const int hidden = p.hidden, ffn = p.ffn;
  const float* x = &p.x[static_cast<size_t>(token) * hidden];
  const float* gradOut = &p.gradOut[static_cast<size_t>(token) * hidden];
  const size_t first = expert * ffn * hidden; // of w2; w1 has twice as many
  double* gradX = &a->gradX[static_cast<size_t>(token) * hidden];
  double* out = &a->out[static_cast<size_t>(token) * hidden];

  std::vector<double> gate(ffn), up(ffn), active(ffn), gradActive(ffn);
  for (int f = 0; f < ffn; f++) {
    gate[f] = dot(&p.w1[2 * first + static_cast<size_t>(f) * hidden], x, hidden);
    up[f] = dot(&p.w1[2 * first + static_cast<size_t>(ffn + f) * hidden], x, hidden);
    active[f] = gate[f] / (1 + std::exp(-gate[f])) * up[f];
  }
  double gradProb = 0;
  for (int h = 0; h < hidden; h++) {
    const float* down = &p.w2[first + static_cast<size_t>(h) * ffn];
    double* gradDown = &a->gradW2[first + static_cast<size_t>(h) * ffn];
    double y = 0;
    for (int f = 0; f < ffn; f++) {
      y += active[f] * down[f];
      gradActive[f] += prob * gradOut[h] * down[f];
      gradDown[f] += prob * gradOut[h] * active[f];
    }
    out[h] += prob * y;
    gradProb += gradOut[h] * y;
  }
  for (int f = 0; f < ffn; f++) {
    const double sigmoid = 1 / (1 + std::exp(-gate[f]));
    const double gradGate = gradActive[f] * up[f] * sigmoid * (1 + gate[f] * (1 - sigmoid));
    const double gradUp = gradActive[f] * gate[f] * sigmoid;
    const size_t ofGate = 2 * first + static_cast<size_t>(f) * hidden,
                 ofUp = 2 * first + static_cast<size_t>(ffn + f) * hidden;
    for (int h = 0; h < hidden; h++) {
      a->gradW1[ofGate + h] += gradGate * x[h];
      a->gradW1[ofUp + h] += gradUp * x[h];
      gradX[h] += gradGate * p.w1[ofGate + h] + gradUp * p.w1[ofUp + h];
    }
  }
  return gradProb;
}

} // namespace

bool solve(const Problem& p, const std::vector<int64_t>& topkIdx, Answer* a) {
  a->out.assign(p.x.size(), 0);
  a->gradX.assign(p.x.size(), 0);
  a->gradRouter.assign(p.router.size(), 0);
  a->gradW1.assign(p.w1.size(), 0);
  a->gradW2.assign(p.w2.size(), 0);
  for (int t = 0; t < p.tokens; t++) {
    const size_t at = static_cast<size_t>(t) * p.hidden;
    const int64_t* selected = &topkIdx[static_cast<size_t>(t) * p.topK];
    std::vector<double> logits(p.experts);
    for (int e = 0; e < p.experts; e++)
      logits[e] = dot(&p.router[static_cast<size_t>(e) * p.hidden], &p.x[at], p.hidden);
    const std::vector<double> probs = softmax(logits);
    if (!isTopK(probs, selected, p.topK)) {
      fprintf(stderr, "token %d: the experts selected are not those with the largest probabilities\n", t);
      return false;
    }
    std::vector<double> gradProbs(p.experts);
    double mean = 0;
    for (int k = 0; k < p.topK; k++) {
      const int64_t e = selected[k];
      gradProbs[e] = visitExpert(p, t, e, probs[e], a);
      mean += gradProbs[e] * probs[e];
    }
    for (int e = 0; e < p.experts; e++) {
      const double gradLogit = probs[e] * (gradProbs[e] - mean);
      for (int h = 0; h < p.hidden; h++) {
        a->gradRouter[static_cast<size_t>(e) * p.hidden + h] += gradLogit * p.x[at + h];
        a->gradX[at + h] += gradLogit * p.router[static_cast<size_t>(e) * p.hidden + h];
      }
    }
  }
  return true;
}
