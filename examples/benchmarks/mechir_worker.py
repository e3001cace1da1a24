"""Runs MechIR 0.2.0 in its own environment: reads aligned pairs as JSON lines, answers with seconds and effects."""

import json
import sys
import time

import torch
from mechir.modelling.cat import Cat


def padded(rows, width, fill=0):
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def main(path, device):
    model = Cat(path, num_labels=1)
    for line in sys.stdin:
        request = json.loads(line)
        width = request['width']
        mask = padded([[1] * len(row) for row in request['original']], width)
        segments = padded(request['segments'], width)
        sides = [
            {
                'input_ids': padded(request[side], width).to(device),
                'attention_mask': mask.to(device),
                'token_type_ids': segments.to(device),
            }
            for side in ('original', 'perturbed')
        ]
        start = time.perf_counter()
        effects, _ = model.patch(*sides, **request['options'])
        if device != 'cpu':
            torch.cuda.synchronize()
        answer = {'seconds': time.perf_counter() - start, 'effects': effects.cpu().tolist()}
        print(json.dumps(answer), flush=True)


if __name__ == '__main__':
    main(*sys.argv[1:])
